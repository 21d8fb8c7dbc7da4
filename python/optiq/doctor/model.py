"""What optiq finds of a model before it measures anything; a refusal is a SourceError."""

from __future__ import annotations

from typing import Any

from ..base.text import dtype_name
from ..sources import load, resolve
from ..sources.check import check
from ..sources.folder import check_folder
from ..sources.loading import quantization
from .checks import Finding


def examine_model(name: str) -> list[Finding]:
    """The check of `name`, line by line; it reads no weight but a head that may be tied."""
    source = resolve(name)
    folder = check_folder(source.path)
    checked = check(folder)
    loaded = load(source, allow_quantized=True)
    findings = [
        Finding("model", str(source.path)),
        Finding("fingerprint", source.fingerprint),
        Finding("architecture", str(folder.config["model_type"])),
        Finding("weights", _weights(source.path, dtype_name(loaded.dtype))),
        Finding("files", f"{len(folder.files)}, {checked.tensors} tensors, none of them twice"),
    ]
    if not checked.traced:
        advice = "mlx-lm's model file reads values while it loads, so tensors cannot be followed"
        findings.append(Finding("tensors", "not followed", advice))
    elif not checked.dropped:
        findings.append(Finding("tensors", "all used"))
    for reason, count in checked.dropped.items():
        findings.append(Finding("tensors dropped", f"{count}: {reason}"))
    for departure in checked.departures:
        findings.append(Finding("not as the original", f"mlx-lm runs it {departure}"))
    for key, value in _flat(checked.settings, folder.config).items():
        findings.append(Finding("handed on to mlx-lm", f"{key} {value}"))
    return [*findings, Finding("tokens", "special tokens lie within the embedding")]


def _weights(path: Any, dtype: str) -> str:
    how = quantization(path)
    return f"{dtype}, quantization in the configuration: {how}" if how else dtype


def _flat(settings: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What differs, with the path of keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            inner = {k: v for k, v in value.items() if config[key].get(k) != v}
            found |= {f"{key}.{k}": v for k, v in inner.items()}
        else:
            found[key] = value
    return found
