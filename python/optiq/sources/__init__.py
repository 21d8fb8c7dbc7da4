"""Models from a local folder, the Hugging Face hub or a GGUF file, all as an mlx-lm folder."""

from __future__ import annotations

import contextlib
from difflib import get_close_matches
from pathlib import Path

from ..base.notice import notice
from ..errors import SourceError
from .check import check
from .folder import check_folder, fingerprint
from .loading import LoadedModel, Source, check_finite, load, open_model

__all__ = ["LoadedModel", "Source", "check_finite", "load", "open_model", "resolve"]


def _near(path: Path) -> str:
    """ "; did you mean X?" where a name nearly like this lies in its folder, else nothing."""
    with contextlib.suppress(OSError):
        names = [entry.name for entry in path.parent.iterdir()]
        if found := get_close_matches(path.name, names, n=1, cutoff=0.7):
            return f"; did you mean {path.with_name(found[0])}?"
    return ""


def resolve(name: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Source:
    """Find the model `name`, fetch or convert it if need be, and check all but the weights' values:
    what the files say is what mlx-lm's model will hold (see check.py).

    `name` is a folder, a .gguf file, or "organisation/model" on the hub (then `revision` may be a
    branch, tag or commit). A GGUF file is converted once into `cache_dir` (default: OPTIQ_CACHE,
    else ~/.cache/optiq). Raises SourceError, also when an option does not apply.
    """
    from . import hub
    from .gguf import convert as gguf

    path = Path(name).expanduser()
    commit = None
    if path.is_dir():
        kind = "folder"
    elif path.suffix.lower() == ".gguf":
        kind = "gguf"
        if not path.is_file():
            raise SourceError(f"there is no file {name}{_near(path)}")
    elif path.exists():
        raise SourceError(f"{name} is a file; give a model folder, a .gguf file or a hub id")
    elif hub.is_repo_id(name):
        kind = "hub"
    else:
        raise SourceError(
            f"there is no folder {name}{_near(path) or '; a hub id is written organisation/model'}"
        )
    if revision is not None and kind != "hub":
        raise SourceError(f"{name} is local; a revision ({revision!r}) only applies to a hub id")
    if kind == "gguf":
        path = gguf.convert(path, cache_dir)
    elif kind == "hub":
        path, commit = hub.download(name, revision)
    folder = check_folder(path)
    checked = check(folder)
    for departure in checked.departures:
        notice(f"mlx-lm runs {name} {departure}")
    mark = fingerprint(folder)
    return Source(
        name, kind, path, commit, mark, checked.settings, checked.departures, checked.towers
    )
