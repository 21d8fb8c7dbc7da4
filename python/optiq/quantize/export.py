"""Export: a plan and a source become a plain mlx-lm folder that needs nothing of ours to load.

The folder is written beside its final place under a temporary name, read back with stock mlx-lm,
compared with the plan, and only then moved into place: it is there whole and right, or not at all.
Weights are read, rounded, written and released one at a time.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..base.progress import Progress
from ..base.text import cause, one_line
from ..errors import ExportError, SourceError
from ..formats import DENSE, NVFP4, Format
from ..models.families import FAMILIES, family_of
from ..models.roles import fixed_bytes, quantizable
from ..planning.plan import Plan
from ..planning.scores import Scores
from ..sources import LoadedModel, Source, beside, check_finite, load, open_model
from ..sources.check import check
from ..sources.folder import WEIGHTS, check_folder, read_config
from ..sources.shards import SHARD_BYTES, Spec, checksum, write_shards
from ..sources.towers import Towers
from .rounding.weights import MINMAX, Rounding, round_weight


def export(
    source: Source,
    plan: Plan,
    out: Path,
    *,
    scores: Scores | None = None,
    rounding: Rounding = MINMAX,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `source` rounded as `plan` says to the folder `out`, which must not exist or be empty.

    `scores` becomes optiq/sensitivity.json. Raises
    ExportError when the plan is for another model, when `out` cannot be written, or when what was
    written differs from the plan; SourceError for a weight that is not finite. After any failure
    nothing is left behind.
    """
    # A folder that is there is filled: somebody may stand in it, or a disk be mounted there.
    place = out if out.is_dir() else out.parent
    partial = place / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        check_target(out)
        loaded = load(source, lazy=True)
        _check_plan(plan, source, loaded)
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(partial.parent).free
        needed = plan.nbytes + plan.model.tower_bytes
        if free < needed:
            raise ExportError(
                f"{out} needs {needed:,} bytes but only {free:,} are free on its disk; "
                "free some space or choose another folder"
            )
        partial.mkdir()
        _write_texts(partial, loaded, plan, scores)
        layout = _layout(loaded, plan)
        parameters = sum(array.size for array in _parameters(loaded.model).values())
        with Progress(needed, "writing") as progress:
            tensors = _counted(_tensors(loaded, plan, rounding), progress)
            checksums = write_shards(
                partial, layout, tensors, parameters=parameters, shard_bytes=shard_bytes
            )
        _verify(partial, plan, layout, checksums, source.towers)
        _move(partial, out)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError when a read fails
        raise ExportError(
            f"{out} cannot be written ({cause(error)}); free space or choose a folder you may "
            "write to; nothing was left behind"
        ) from error
    finally:
        # Also after Ctrl-C; when the move succeeded there is nothing to remove.
        shutil.rmtree(partial, ignore_errors=True)


def clear(out: Path, *, keep: bool) -> None:
    """Remove the folder `out` that was written, or with `keep` only what lies in it."""
    if not keep:
        shutil.rmtree(out)
        return
    for entry in out.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _move(partial: Path, out: Path) -> None:
    if not out.is_dir():
        partial.rename(out)
        return
    try:  # the config comes last: a folder without it is not a model
        for entry in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            entry.rename(out / entry.name)
    except BaseException:
        clear(out, keep=True)
        raise


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to. When all went well it takes the place of `out`."""
    mark = secrets.token_hex(4)
    fresh, old = (out.with_name(f".{out.name}.{mark}.{word}") for word in ("new", "old"))
    try:
        yield fresh
        if fresh.exists():  # else nothing was to be written
            out.rename(old)
            try:
                fresh.rename(out)
            except OSError:
                old.rename(out)
                raise
            shutil.rmtree(old)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_ours(out: Path) -> None:
    """Raise ExportError unless the folder `out` is empty, or a model that optiq wrote."""
    if out.is_dir() and any(out.iterdir()) and not (out / "optiq" / "plan.json").is_file():
        raise ExportError(
            f"{out} was not written by optiq convert, so --overwrite does not replace it; remove "
            "it yourself, or choose another folder"
        )
    if not out.is_dir():
        raise ExportError(f"{out} is a file; choose another folder")


def check_target(out: Path) -> None:
    """Raise ExportError unless `out` does not exist or is an empty folder."""
    if out.is_dir():
        if any(out.iterdir()):
            raise ExportError(
                f"{out} exists and is not empty; choose another folder, or replace a model of "
                "optiq's with --overwrite"
            )
    elif out.exists() or out.is_symlink():
        raise ExportError(f"{out} is a file; choose another folder")


def _check_plan(plan: Plan, source: Source, loaded: LoadedModel) -> None:
    """Raise ExportError unless the plan names exactly this model's modules and bytes."""
    fingerprint = plan.model.fingerprint
    if fingerprint not in (None, source.fingerprint):
        raise ExportError(
            f"the plan is for {plan.model.name}, not for {source.name} as it is now; "
            "measure and plan again"
        )
    modules = quantizable(loaded.model)
    actual = {m.path: m.shape for m in modules}
    planned = {m.module.path: m.module.shape for m in plan.modules}
    wrong = [p for p in actual | planned if actual.get(p) != planned.get(p)]
    if wrong:
        path = wrong[0]
        raise ExportError(
            f"the plan does not match {source.name}: {path} is {planned.get(path, 'missing')} in "
            f"the plan and {actual.get(path, 'missing')} in the model ({len(wrong)} such modules); "
            "measure and plan again"
        )
    expected = {
        "itemsize": loaded.dtype.size,
        "fixed_bytes": fixed_bytes(loaded.model, modules),
        "tower_bytes": source.towers.nbytes if source.towers else 0,
    }
    for key, value in expected.items():
        if getattr(plan.model, key) != value:
            raise ExportError(
                f"the plan counts {key} as {getattr(plan.model, key)}, {source.name} has {value}; "
                "measure and plan again"
            )


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def _taken(model: nn.Module) -> dict[str, mx.array]:
    """The parameters, which the model no longer holds, so that each can be released."""
    found = _parameters(model)
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    return found


def _layout(loaded: LoadedModel, plan: Plan) -> dict[str, Spec]:
    """Every tensor of the folder, in the model's own order."""
    formats = {f"{m.module.path}.weight": m.format for m in plan.modules}
    layout: dict[str, Spec] = {}
    for name, array in _parameters(loaded.model).items():
        fmt = formats.get(name)
        dtype = array.dtype if fmt is None else loaded.dtype
        layout |= _entries(name, Spec.of(dtype, array.shape), fmt or DENSE)
    if towers := loaded.source.towers:
        for tensor in towers.tensors:
            layout |= _entries(tensor.name, tensor.spec, towers.formats.get(tensor.name, DENSE))
    return layout


def _entries(name: str, dense: Spec, fmt: Format) -> dict[str, Spec]:
    """What a file holds of the weight `dense` in `fmt`."""
    if fmt == DENSE:
        return {name: dense}
    *outer, width = dense.shape
    groups = Spec("U8" if fmt == NVFP4 else dense.dtype, (*outer, width // fmt.group_size))
    base = name.removesuffix("weight")
    entries = {
        name: Spec.of(mx.uint32, (*outer, width * fmt.bits // 32)),
        f"{base}scales": groups,
        f"{base}biases": groups,
    }
    if fmt == NVFP4:
        del entries[f"{base}biases"]
    return entries


def _tensors(loaded: LoadedModel, plan: Plan, rounding: Rounding) -> Iterator[tuple[str, mx.array]]:
    """The tensors of `_layout`, evaluated; the model is emptied so that each can be released."""
    formats = {f"{m.module.path}.weight": m.format for m in plan.modules}
    dtype = loaded.dtype
    weights = _taken(loaded.model)
    weights |= {f"{path}.weight": weight for path, weight in rounding.norms.items()}
    for name in list(weights):
        array = weights.pop(name)
        fmt = formats.get(name)
        yield from _stored(name, array, fmt, dtype, rounding)
        del array
        mx.clear_cache()
    if towers := loaded.source.towers:
        for name, array in towers.arrays():
            if fmt := towers.formats.get(name):
                yield from _stored(name, array, fmt, array.dtype, MINMAX)
            else:
                yield name, array  # also an infinite bound of a clipped layer
            del array
            mx.clear_cache()


def _stored(
    name: str, array: mx.array, fmt: Format | None, dtype: mx.Dtype, rounding: Rounding
) -> Iterator[tuple[str, mx.array]]:
    """One parameter as it is stored. Planned weights take the model's dtype, others keep theirs."""
    if fmt is None or fmt == DENSE:
        check_finite(name, array)
        yield name, array if fmt is None else array.astype(dtype)
        return
    rounded = round_weight(array.astype(dtype), fmt, rounding, name.removesuffix(".weight"))
    mx.eval(*rounded)
    base = name.removesuffix("weight")
    for part, stored in zip((name, f"{base}scales", f"{base}biases"), rounded, strict=True):
        if stored is not None:
            yield part, stored


def _counted(
    tensors: Iterator[tuple[str, mx.array]], progress: Progress
) -> Iterator[tuple[str, mx.array]]:
    for name, array in tensors:
        yield name, array
        progress.step(array.nbytes, name)


def _write_texts(folder: Path, loaded: LoadedModel, plan: Plan, scores: Scores | None) -> None:
    """config.json, what belongs to the source beside it, and optiq/."""
    source = loaded.source
    config = read_config(source.path) | source.settings
    config.pop("_name_or_path", None)
    quantization = plan.quantization()
    if source.towers:
        quantization |= source.towers.quantization()
    elif "vision_tower" not in getattr(loaded.model, "model", {}):  # as mlx-lm's own converter
        config.pop("vision_config", None)
    config["quantization"] = config["quantization_config"] = quantization
    texts = {
        "config.json": json.dumps(dict(sorted(config.items())), indent=4),
        "optiq/plan.json": json.dumps(plan.to_json(), indent=2),
    }
    if scores is not None:
        texts["optiq/sensitivity.json"] = json.dumps(scores.to_json(), indent=2)
    vocabulary = getattr(loaded.tokenizer, "vocab_files_names", {}).values()
    for file in beside.kept(source.path, vocabulary):
        own = file.relative_to(source.path)
        for copy in (own, beside.SOURCE_CARD) if own == beside.CARD else (own,):
            (folder / copy).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / copy)
    if generation := _sampling(source.path, config, loaded.tokenizer):
        texts["generation_config.json"] = json.dumps(generation, indent=2)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _sampling(path: Path, config: dict[str, Any], tokenizer: Any) -> dict[str, Any] | None:
    """generation_config.json with what the makers recommend, where it says nothing of sampling."""
    family = family_of(config, FAMILIES)
    if family is None or not getattr(tokenizer, "has_chat_template", False):
        return None
    file = path / "generation_config.json"
    own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    added = family.defaults(config)
    if not added or any(own.get(key) is not None for key in ("temperature", "top_p", "top_k")):
        return None
    return {**own, "do_sample": True, **added}


def _verify(
    folder: Path,
    plan: Plan,
    layout: Mapping[str, Spec],
    checksums: Mapping[str, int],
    towers: Towers | None = None,
) -> None:
    """Load the folder with stock mlx-lm and raise ExportError where it differs from the plan.

    What mlx-lm leaves out of it are the towers; these are read back by name.
    """
    try:
        written = Source("the folder", "folder", folder, None, "")
        loaded = load(written, allow_quantized=True)
        if added := check(check_folder(folder)).settings:
            raise SourceError(f"mlx-lm does not read {sorted(added)[0]} of its config.json")
    except SourceError as error:
        raise _mismatch(f"it does not load ({error})") from error
    parameters = _taken(loaded.model)
    nbytes = sum(array.nbytes for array in parameters.values())
    if towers:
        parameters |= _beside(folder, layout.keys() - parameters.keys())
    if parameters.keys() != layout.keys():
        names = sorted(parameters.keys() ^ layout.keys())
        raise _mismatch(f"{names[0]} is on one side only ({len(names)} such tensors)")
    for name in list(parameters):
        array = parameters.pop(name)
        if Spec.of(array.dtype, array.shape) != layout[name]:
            raise _mismatch(f"{name} is {array.dtype} {array.shape}, not {layout[name]}")
        if checksum(array) != checksums[name]:
            raise _mismatch(f"{name} was read back with other bytes than were written")
    if nbytes != plan.nbytes:
        raise _mismatch(f"its tensors are {nbytes:,} bytes, not {plan.nbytes:,}")
    modules = dict(loaded.model.named_modules())
    for planned in plan.modules:
        module: Any = modules[planned.module.path]
        found = tuple(getattr(module, key, None) for key in ("mode", "bits", "group_size"))
        fmt = planned.format
        if found != ((None,) * 3 if fmt == DENSE else (fmt.mode, fmt.bits, fmt.group_size)):
            raise _mismatch(f"{planned.module.path} loads as mode, bits, group {found}, not {fmt}")
    _check_forward(open_model(written, converting=False)[0])


def _beside(folder: Path, names: Collection[str]) -> dict[str, mx.array]:
    """The tensors in the folder's files that mlx-lm's model does not have."""
    found: dict[str, mx.array] = {}
    for file in folder.glob(WEIGHTS):
        tensors: Any = mx.load(str(file))
        found |= {name: array for name, array in tensors.items() if name in names}
    return found


def _check_forward(model: nn.Module) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    tokens = mx.array([[0]])  # on x86 each takes two seconds for a billion weights
    try:
        logits = model(tokens, cache=make_prompt_cache(model))
        finite = mx.all(logits < mx.inf)  # minus infinity: a word that is never said
        _taken(model)  # so that each weight is released when it has been used
        mx.eval(finite)
    except Exception as error:  # whatever a model file raises
        raise _mismatch(f"it does not run ({one_line(error)})") from error
    if not finite.item():
        raise _mismatch("its logits are not finite")


def _mismatch(what: str) -> ExportError:
    return ExportError(f"the written model is not the plan: {what}; nothing was left behind")
