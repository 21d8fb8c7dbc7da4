"""What a card is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..errors import UsageError
from ..sources.hub import is_repo_id

if TYPE_CHECKING:
    from typing_extensions import Unpack


# The names that the hub takes (huggingface.co/docs/hub/repositories-licenses).
_NAMES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
    c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
    ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0
    odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(_NAMES.split())


class CardFields(TypedDict, total=False):
    """The options of `optiq.card`; see `CardOptions`."""

    name: str | None
    base_model: str | None
    license: str | None
    uniform: str | Path | None
    force: bool


@dataclass(frozen=True)
class CardOptions:
    """
    Attributes:
        name: What the card calls the model, such as its hub id (default: the folder's name).
        base_model: The hub id of what it was made from (default: as plan.json has it).
        license: Its licence (default: that of the base model's card, where it is known).
        uniform: A model folder of stock uniform quantization of the same bytes, with records.
        force: Replace whatever file is there; else only a card that nobody changed.
    """

    name: str | None = None
    base_model: str | None = None
    license: str | None = None
    uniform: Path | None = None
    force: bool = False

    @classmethod
    def parse(cls, **fields: Unpack[CardFields]) -> CardOptions:
        """Check the options as a user gives them; UsageError names the fix."""
        given: dict[str, Any] = dict(fields)
        if (uniform := given.pop("uniform", None)) is not None:
            uniform = Path(uniform).expanduser()
        options = cls(**given, uniform=uniform)
        if options.base_model is not None and not is_repo_id(options.base_model):
            raise UsageError(
                f"--base-model {options.base_model} is not a hub id like organisation/model"
            )
        if options.license is not None and options.license not in LICENSES:
            near = get_close_matches(options.license, LICENSES, n=1)
            meant = f"did you mean {near[0]}?" if near else 'use "other" for one without a name'
            raise UsageError(
                f"--license {options.license} is not one that the hub knows, such as apache-2.0 or "
                f"mit; {meant}"
            )
        return options
