"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them, for who has an admin key."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

from ....errors import AdapterError, RequestError
from ....lora.mounting import opened
from ..fields import Fields
from ..protocol import Service


async def load(service: Service, body: Fields, client: str) -> dict[str, Any]:
    """Mount the adapter in a folder of this machine. A stream that runs goes on as it is."""
    adapters = service.adapters
    name, path = str(body.required("lora_name")), str(body.required("lora_path"))
    if adapters is None:
        raise _none()
    began = perf_counter()
    try:
        adapter = await service.answers.preparer.prepare(lambda: opened(Path(path)))
        adapters.mount(name, adapter)
    except AdapterError as error:
        raise RequestError(str(error), "lora_path") from error
    return {
        "name": f"{service.model.name}:{name}",
        "sha256": adapter.digest,
        "bytes": adapter.nbytes,
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


def _none() -> RequestError:
    return RequestError("this server has no adapters; start it with --admin-key-file FILE")
