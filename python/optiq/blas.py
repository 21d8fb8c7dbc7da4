"""Gives MLX on Linux a fast float32 matmul, if it is asked for before MLX is loaded.

MLX's Linux wheel is linked to the reference BLAS: a scalar loop on one core, 50 times slower
than this processor can do. `liboptiq_cpu.so` exports the one routine MLX takes from it,
`cblas_sgemm` (csrc/cpu/blas.cpp), and loading it with RTLD_GLOBAL puts it first in the search
order, as preloading OpenBLAS would. A BLAS the user preloaded comes earlier still and wins.
OPTIQ_BLAS=system leaves everything as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
import warnings
from pathlib import Path


def provide() -> None:
    """Put our `cblas_sgemm` first. Called by `import optiq`, before anything loads MLX."""
    if sys.platform != "linux" or os.environ.get("OPTIQ_BLAS") == "system":
        return
    if os.environ.get("OPTIQ_NATIVE") == "0":
        return
    extension = importlib.util.find_spec("optiq._ext")  # an editable install keeps it elsewhere
    if extension is None or extension.origin is None:
        return  # not built: optiq.ops says so
    if "mlx.core" in sys.modules:  # too late: MLX has bound its own
        if not provider():
            warnings.warn(
                "mlx was imported before optiq, so MLX's own float32 matmul stays slow on Linux; "
                "import optiq before mlx and mlx_lm",
                RuntimeWarning,
                stacklevel=3,
            )
        return
    with contextlib.suppress(OSError):
        library = Path(extension.origin).parent / "liboptiq_cpu.so"
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def provider() -> str:
    """The file whose `cblas_sgemm` comes first for libraries loaded from now on, or ""."""
    if sys.platform != "linux":
        return ""

    class DlInfo(ctypes.Structure):
        _fields_ = (
            ("fname", ctypes.c_char_p),
            ("fbase", ctypes.c_void_p),
            ("sname", ctypes.c_char_p),
            ("saddr", ctypes.c_void_p),
        )

    process = ctypes.CDLL(None)
    info = DlInfo()
    try:
        address = ctypes.cast(process.cblas_sgemm, ctypes.c_void_p)
    except AttributeError:
        return ""
    process.dladdr(address, ctypes.byref(info))
    return info.fname.decode() if info.fname else ""
