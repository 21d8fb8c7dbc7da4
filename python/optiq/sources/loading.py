"""From a resolved source to the stock mlx-lm model, with weights still on disk."""

from __future__ import annotations

import io
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from ..base.modules import leaf_modules
from ..base.notice import notice
from ..base.text import dtype_name, one_line
from ..errors import SourceError
from .config import holders
from .folder import WEIGHTS, mlx_lm_version, read_config
from .packed import Packing, packing, unpacked
from .safetensors import read_header
from .tokens import check_tokens, refusal
from .towers import Towers

CHECKED = 1 << 18  # numbers of a weight that are checked at a time; they stay in a cache
# The integer type of a float's size, and infinity's bits. Only NaN has larger ones, sign aside.
_BITS = {
    mx.float16: (mx.uint16, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7F80),
    mx.float32: (mx.uint32, 0x7F800000),
}

# The end of the name of what packed weights have beside them, in any of the usual formats.
_SCALES = re.compile(
    r"(scales?|scale_inv|biases|qweight|qzeros|g_idx|packed|blocks|absmax|quant_map|SCB|W_q"
    r"|quant_state[\w.]*)$"
)


@dataclass(frozen=True)
class Source:
    """Where a model lies; made by `resolve`."""

    name: str  # what the user typed
    kind: str  # "folder", "hub" or "gguf"
    path: Path  # a local Hugging Face or mlx-lm folder
    revision: str | None  # the hub's commit hash
    fingerprint: str  # sha256, see folder.fingerprint
    # What is added to config.json for mlx-lm, see check.py; nothing where the folder is stock's.
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    departures: tuple[str, ...] = ()  # how mlx-lm's model differs from it, see departures.py
    towers: Towers | None = field(default=None, hash=False)  # what an export keeps beside the model

    @property
    def label(self) -> str:
        """What files call it: its id on the hub, or the last part of its path on this machine."""
        return self.name if self.kind == "hub" else Path(self.name).expanduser().resolve().name


@dataclass(frozen=True)
class LoadedModel:
    """A stock mlx-lm model; `dtype` is the floating dtype that most weight bytes have."""

    source: Source
    model: nn.Module
    tokenizer: Any  # mlx_lm.tokenizer_utils.TokenizerWrapper
    config: dict[str, Any]
    dtype: mx.Dtype


def load(source: Source, *, lazy: bool = True, allow_quantized: bool = False) -> LoadedModel:
    """Load `source` with mlx-lm's own classes; with `lazy` no weight is read before it is used.

    Unless `allow_quantized`, weights have the dtype that mlx-lm's converter gives them. Raises
    SourceError when mlx-lm cannot load the model or the tokenizer, and for an already quantized
    model unless `allow_quantized`.
    """
    from mlx_lm.utils import load_tokenizer  # here: two seconds of transformers

    # Some architectures dequantize fp8 weights in mlx-lm's own code; of the others it says so.
    if not allow_quantized and (how := quantization(source.path)) not in (None, "fp8"):
        # A bitnet model of plain weights still rounds them while it runs.
        dense = _is_dense(source.path)
        if how == "bitnet" or not (dense or _packing(source.path)):
            raise _already_quantized(source, how)
        notice(
            f"{source.name}: config.json says {how}, but the weights are plain floating point "
            "numbers; they are taken as they are"
            if dense
            else f"the weights of {source.name} are quantized ({how}); each is made plain again as "
            "it is read. What they lost before is lost"
        )
    try:
        model, config = open_model(source, converting=not allow_quantized)
        if not lazy:
            mx.eval(model.parameters())
    except SourceError as error:
        raise SourceError(f"{source.name}: {error}") from error
    except Exception as error:
        if not allow_quantized and (how := quantization(source.path) or _undeclared(source.path)):
            raise _already_quantized(source, how) from error
        raise SourceError(
            f"mlx-lm {mlx_lm_version()} cannot load {source.name}: {one_line(error)}"
        ) from error
    if not allow_quantized:
        if config.get("quantization"):  # mlx-lm keeps the fp8 weights packed
            raise _already_quantized(source, quantization(source.path))
        _check_dense(source, model)
    tokenizer = _load_tokenizer(load_tokenizer, source, config)
    check_tokens(source.name, source.path, model, tokenizer, config)
    return LoadedModel(source, model, tokenizer, config, _main_dtype(source, model))


def open_model(source: Source, *, converting: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model of `source` and its config; no weight is read. Raises what mlx-lm raises.

    With `converting`, weights have the dtype that mlx-lm's converter gives them. Those that others
    have packed are plain again, and a quantization that config.json names is not applied.
    """
    from mlx_lm.utils import _get_classes, load_model

    settings = dict(source.settings)
    packed = _packing(source.path) if converting else None
    stale = converting and quantization(source.path) not in (None, "bitnet")
    if packed or (stale and _is_dense(source.path)):
        settings |= dict.fromkeys(("quantization", "quantization_config"))

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        """mlx-lm's; with packed weights the model unpacks them before it looks at their names."""
        model_class, args_class = _get_classes(config)
        return (partial(_unpacking, model_class, packed) if packed else model_class), args_class

    printed = io.StringIO()
    model: nn.Module
    config: dict[str, Any]
    try:
        with redirect_stdout(printed), _plain_path(source.path) as path:
            model, config = load_model(
                path, lazy=True, model_config=settings, get_model_classes=classes
            )
    except SystemExit as error:  # a model file that lacks a package prints so and exits
        raise RuntimeError(printed.getvalue() or "its model file exits") from error
    if packed:
        del model.sanitize  # its class has it
    for module in model.modules():
        if not hasattr(module, "_no_grad"):  # recurrent_gemma leaves it out
            nn.Module.__init__(module)
    if converting and not config.get("quantization"):
        _cast(model, config)
    return model, config


def _unpacking(model_class: Any, packed: Packing, args: Any) -> nn.Module:
    """A model whose `sanitize` is given plain weights."""
    model: Any = model_class(args)
    sanitize = getattr(model, "sanitize", lambda weights: weights)
    model.sanitize = lambda weights: sanitize(unpacked(weights, packed))
    return model  # type: ignore[no-any-return]


@contextmanager
def _plain_path(path: Path) -> Iterator[Path]:
    """The folder under a path that mlx-lm does not take for a pattern."""
    if not re.search(r"[*?\[]", str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="optiq-") as folder:
        link = Path(folder) / "model"
        link.symlink_to(path.absolute(), target_is_directory=True)
        yield link


def _is_dense(path: Path) -> bool:
    """Whether all matrices of the folder are plain floating point numbers, without scales."""
    tensors = {n: t for file in path.glob(WEIGHTS) for n, t in read_header(file).items()}
    return not any(
        _SCALES.search(name) or (name.endswith("weight") and not tensor.floating)
        for name, tensor in tensors.items()
    )


def _cast(model: nn.Module, config: dict[str, Any]) -> None:
    """Cast weights, lazily, as `mlx_lm.convert` does before it quantizes."""
    text_config = config.get("text_config")
    dtype = config.get("torch_dtype") or (text_config or {}).get("dtype")
    if dtype not in ("float16", "bfloat16", "float32"):
        return
    wanted: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)

    def cast(name: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(getattr(mx, dtype)) if floating and wanted(name) else array

    model.update(tree_map_with_path(cast, model.parameters()))


def quantization(path: Path) -> str | None:
    """How the configuration files of the folder `path` say its weights are quantized, or None."""
    config = read_config(path)
    if params := config.get("quantization"):
        if not isinstance(params, dict):
            return str(params)
        return f"{params.get('mode', 'affine')} {params.get('bits')}-bit"
    for _, holder in holders(config):
        if params := holder.get("quantization_config"):
            method = params.get("quant_method") if isinstance(params, dict) else None
            return str(method or "by an unnamed method")
    # Where NVIDIA's exporter writes what others write into config.json.
    return "modelopt" if (path / "hf_quant_config.json").exists() else None


def check_finite(name: str, array: mx.array) -> None:
    """Raise SourceError if the weight `name` holds a NaN or an infinity.

    NumPy reads the bits where they lie: MLX's `isfinite` takes 20 times as long on a CPU, and more
    memory than the weight.
    """
    if array.dtype not in _BITS:
        return
    dtype, infinity = _BITS[array.dtype]
    bits = np.asarray(array.view(dtype)).reshape(-1)
    no_sign = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    parts = (bits[start : start + CHECKED] for start in range(0, bits.size, CHECKED))
    if any((part & no_sign).max() >= infinity for part in parts):
        raise SourceError(
            f"the weight {name} holds NaN or infinite values; "
            "the file is damaged or was saved badly: get it again"
        )


def _already_quantized(source: Source, how: str | None) -> SourceError:
    return SourceError(
        f"{source.name} is already quantized ({how}); give the unquantized original model"
    )


def _packing(path: Path) -> Packing | None:
    """How the weights of the folder are packed, if they are, and can be made plain."""
    config = read_config(path)
    return None if config.get("quantization") or _is_dense(path) else packing(config)


def _undeclared(path: Path) -> str | None:
    """The method that the names of the tensors show, where no configuration file names one."""
    names = [name for file in path.glob(WEIGHTS) for name in read_header(file)]
    if any(name.endswith(".g_idx") for name in names):
        return "gptq"
    return "packed weights" if any(name.endswith(".qweight") for name in names) else None


def _check_dense(source: Source, model: nn.Module) -> None:
    """Raise SourceError for a weight to be quantized that holds integers."""
    layers: dict[str, Any] = leaf_modules(model)
    for path, layer in layers.items():
        if hasattr(layer, "to_quantized") and not mx.issubdtype(layer.weight.dtype, mx.floating):
            dtype = dtype_name(layer.weight.dtype)
            raise SourceError(
                f"the weight {path}.weight of {source.name} holds {dtype}, no floating point "
                "numbers; give the unquantized original model"
            )


def _load_tokenizer(load_tokenizer: Any, source: Source, config: dict[str, Any]) -> Any:
    try:
        # trust_remote_code=False refuses at once where None would ask on the terminal.
        return load_tokenizer(
            source.path,
            {"trust_remote_code": False},
            eos_token_ids=config.get("eos_token_id"),
        )
    except Exception as error:
        raise SourceError(refusal(source.name, source.path, error)) from error


def _main_dtype(source: Source, model: nn.Module) -> mx.Dtype:
    nbytes: Counter[mx.Dtype] = Counter()
    leaves: Any = tree_flatten(model.parameters())
    for _, array in leaves:
        if mx.issubdtype(array.dtype, mx.floating):
            nbytes[array.dtype] += array.nbytes
    if not nbytes:
        raise SourceError(f"{source.name} has no floating point weights")
    return nbytes.most_common(1)[0][0]
