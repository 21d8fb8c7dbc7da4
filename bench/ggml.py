"""Products of ggml, the kernels of llama.cpp, through ctypes: the yardstick of `bench/peers.py`.

`folder` holds the shared libraries that building `llama-cpp-python` from its source package
leaves in `llama_cpp/lib` (or any build of ggml >= 0.9 with shared libraries).
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

TYPES = {"f32": 0, "q4_0": 2, "q8_0": 8, "q4_K": 12, "bf16": 30}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Ggml:
    """A CPU backend with a fixed number of threads."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._base = _functions(_load(folder, "ggml-base"), _BASE)
        self._cpu = _functions(_load(folder, "ggml-cpu"), _CPU)
        self._backend = self._cpu["ggml_backend_cpu_init"]()
        self._cpu["ggml_backend_cpu_set_n_threads"](self._backend, threads)

    def product(self, kind: str, w: np.ndarray, rows: int, repacked: bool = False) -> Product:
        """`x @ w.T` for `w [out, in]` stored as `kind` and `rows` rows of float32 `x`.

        `repacked` stores the weight interleaved for this processor, where ggml can.
        """
        b = self._base
        out, inner = w.shape
        context = b["ggml_init"](_InitParams(1 << 20, None, True))
        a = b["ggml_new_tensor_2d"](context, TYPES[kind], inner, out)
        x = b["ggml_new_tensor_2d"](context, TYPES["f32"], inner, rows)
        y = b["ggml_mul_mat"](context, a, x)
        graph = b["ggml_new_graph"](context)
        b["ggml_build_forward_expand"](graph, y)
        weights = (
            self._repacking()
            if repacked
            else b["ggml_backend_get_default_buffer_type"](self._backend)
        )
        size = b["ggml_nbytes"](a)
        buffer = b["ggml_backend_buft_alloc_buffer"](weights, 2 * size + 4096)
        b["ggml_backend_tensor_alloc"](buffer, a, b["ggml_backend_buffer_get_base"](buffer))
        codes = np.empty(size, np.uint8)
        w = np.ascontiguousarray(w, np.float32)
        b["ggml_quantize_chunk"](
            TYPES[kind], w.ctypes.data_as(POINTER(c_float)), codes.ctypes.data, 0, out, inner, None
        )
        b["ggml_backend_tensor_set"](a, codes.ctypes.data, 0, size)
        b["ggml_backend_alloc_ctx_tensors"](context, self._backend)
        return Product(self, context, graph, x, y, (rows, inner), (rows, out))

    def _repacking(self) -> c_void_p:
        """The buffer type that interleaves rows when a weight is stored."""
        get = self._base["ggml_backend_get_device"](self._backend)
        registry = self._base["ggml_backend_dev_backend_reg"](get)
        address = self._base["ggml_backend_reg_get_proc_address"](
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        kinds = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(get)
        i = 0
        while kinds[i]:
            kind = c_void_p(kinds[i])
            if b"REPACK" in self._base["ggml_backend_buft_name"](kind):
                return kind
            i += 1
        raise RuntimeError("this ggml cannot repack weights on this processor")


class Product:
    """A weight in ggml's memory and a graph that multiplies with it."""

    def __init__(
        self,
        ggml: Ggml,
        context: c_void_p,
        graph: c_void_p,
        x: c_void_p,
        y: c_void_p,
        shape: tuple[int, int],
        out: tuple[int, int],
    ) -> None:
        self._ggml, self._context, self._graph = ggml, context, graph
        self._x, self._y, self._shape, self._out = x, y, shape, out

    def set(self, x: np.ndarray) -> None:
        x = np.ascontiguousarray(x, np.float32).reshape(self._shape)
        self._ggml._base["ggml_backend_tensor_set"](self._x, x.ctypes.data, 0, x.nbytes)

    def run(self) -> None:
        self._ggml._base["ggml_backend_graph_compute"](self._ggml._backend, self._graph)

    def get(self) -> np.ndarray:
        y = np.empty(self._out, np.float32)
        self._ggml._base["ggml_backend_tensor_get"](self._y, y.ctypes.data, 0, y.nbytes)
        return y


def _load(folder: Path, name: str) -> ctypes.CDLL:
    for suffix in ("so", "dylib"):
        path = folder / f"lib{name}.{suffix}"
        if path.exists():
            return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    raise FileNotFoundError(
        f"{folder} holds no lib{name}; build llama-cpp-python from source and name its lib folder"
    )


def _functions(library: ctypes.CDLL, table: dict[str, tuple[object, list[object]]]) -> dict:
    bound = {}
    for name, (result, arguments) in table.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        bound[name] = function
    return bound


P = c_void_p
_BASE: dict[str, tuple[object, list[object]]] = {
    "ggml_init": (P, [_InitParams]),
    "ggml_new_tensor_2d": (P, [P, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (P, [P, P, P]),
    "ggml_new_graph": (P, [P]),
    "ggml_build_forward_expand": (None, [P, P]),
    "ggml_nbytes": (c_size_t, [P]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, POINTER(c_float), P, c_int64, c_int64, c_int64, P],
    ),
    "ggml_backend_get_default_buffer_type": (P, [P]),
    "ggml_backend_buft_alloc_buffer": (P, [P, c_size_t]),
    "ggml_backend_buffer_get_base": (P, [P]),
    "ggml_backend_tensor_alloc": (c_int, [P, P, P]),
    "ggml_backend_alloc_ctx_tensors": (P, [P, P]),
    "ggml_backend_tensor_set": (None, [P, P, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [P, P, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [P, P]),
    "ggml_backend_get_device": (P, [P]),
    "ggml_backend_dev_backend_reg": (P, [P]),
    "ggml_backend_reg_get_proc_address": (P, [P, c_char_p]),
    "ggml_backend_buft_name": (c_char_p, [P]),
}
_CPU: dict[str, tuple[object, list[object]]] = {
    "ggml_backend_cpu_init": (P, []),
    "ggml_backend_cpu_set_n_threads": (None, [P, c_int]),
}
