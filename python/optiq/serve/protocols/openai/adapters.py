"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them, for who has an admin key."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from ....base.background import in_background
from ....errors import AdapterError, RequestError
from ....lora.merging import combined
from ....lora.mounting import opened
from ...engine.adapters import Adapters, Mounted
from ...engine.sums import MOST
from ..fields import Fields
from ..protocol import Service


async def load(service: Service, body: Fields, client: str) -> dict[str, Any]:
    """Mount the adapter in a folder of this machine, or a weighted sum of several.

    A stream that runs goes on as it is.
    """
    adapters = service.adapters
    name, weights = str(body.required("lora_name")), _weights(body)
    if adapters is None:
        raise _none()
    began = perf_counter()
    try:
        mount = partial(_mounted, adapters, name, weights)
        mounted = await service.answers.preparer.prepare(partial(in_background, mount))
    except AdapterError as error:
        raise RequestError(str(error), "lora_path") from error
    return {
        "name": f"{service.model.name}:{name}",
        "sha256": mounted.digest,
        "bytes": mounted.nbytes,
        "ms": round(1000 * (perf_counter() - began), 1),
    }


async def unload(service: Service, body: Fields, client: str) -> dict[str, Any]:
    """Unmount an adapter. Answers that use it are finished with it."""
    name = str(body.required("lora_name"))
    if service.adapters is None:
        raise _none()
    try:
        service.adapters.unmount(name)
    except AdapterError as error:
        raise RequestError(str(error), "lora_name") from error
    return {"name": f"{service.model.name}:{name}", "mounted": list(service.adapters.names)}


def _mounted(adapters: Adapters, name: str, weights: Mapping[str, float]) -> Mounted:
    adapter = combined([(opened(Path(path)), weight) for path, weight in weights.items()])
    return adapters.mount(name, adapter)


def _weights(body: Fields) -> dict[str, float]:
    """By folder, of a folder or of an object of folders and numbers."""
    given = body.required("lora_path")
    if isinstance(given, str):
        return {given: 1.0}
    several = body.object("lora_path")
    if several is None or not several.values:
        raise body.wrong("lora_path", "names no folder")
    return {path: several.number(path, 1.0, -MOST, MOST) for path in several.values}


def _none() -> RequestError:
    return RequestError("this server has no adapters; start it with --admin-key-file FILE")
