"""What can be told about the model that another was made from: hub id, licence, languages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..planning.scores import ModelInfo
from ..sources.beside import CARD
from ..sources.hub import TIMEOUT_SECONDS, is_repo_id


@dataclass(frozen=True)
class BaseModel:
    """`name` is the hub id, or the last part of a local folder; what is not known is None."""

    hub_id: str | None
    name: str
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | list[str] | None = None


def describe(
    source: ModelInfo, kept: Path, hub_id: str | None = None, license: str | None = None
) -> BaseModel:
    """The model that plan.json says `source` of.

    `hub_id` and `license` override what is found: in `kept`, the copy of the source's card, in a
    README.md beside a local model, else on the hub where it can be asked.
    """
    local = Path(source.path or source.name).expanduser()
    if hub_id is None and _is_from_hub(source, local):
        hub_id = source.name
    said = _card(kept) or _card(local / CARD) or (_hub_card(hub_id) if hub_id else {})
    keys = ("license", "license_name", "license_link", "language")
    base = BaseModel(hub_id, hub_id or local.name, **{key: said.get(key) for key in keys})
    if license is not None:
        return replace(base, license=license, license_name=None, license_link=None)
    return base


def _is_from_hub(source: ModelInfo, local: Path) -> bool:
    """Whether its name is a hub id. Plans of earlier versions do not say: there it is one if it
    looks like one and is neither a file nor a folder here.
    """
    if source.kind is not None:
        return source.kind == "hub"
    gguf = source.name.lower().endswith(".gguf")
    return is_repo_id(source.name) and not gguf and not local.exists()


def _card(file: Path) -> Mapping[str, Any]:
    """The front matter of a card, if there is one."""
    import yaml

    # YAML 1.2 as the hub reads it: only true and false are booleans, so `no` is Norwegian.
    boolean = "tag:yaml.org,2002:bool"
    loader: Any = type("HubLoader", (yaml.SafeLoader,), {})
    loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != boolean]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    loader.add_implicit_resolver(
        boolean, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )
    try:
        text = file.read_text(encoding="utf-8-sig")
        match = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        said = yaml.load(match[1], Loader=loader) if match else None  # a safe loader
    except (OSError, ValueError, yaml.YAMLError):  # no such file, or front matter that is not YAML
        return {}
    return said if isinstance(said, dict) else {}


def _hub_card(hub_id: str) -> Mapping[str, Any]:
    """The front matter of a hub model's card; nothing where the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(hub_id, timeout=TIMEOUT_SECONDS)
    except Exception:  # offline, or gone: the licence is then "not recorded"
        return {}
    return {} if info.card_data is None else dict(vars(info.card_data))
