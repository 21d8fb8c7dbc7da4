"""Installed packages that a sandbox shows to its programs, for reading alone."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from ..errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Where importing the package alone leaves most of the work to the first use.
_MAIN_MODULE = {"matplotlib": "matplotlib.pyplot"}


@dataclass(frozen=True)
class Packages:
    """What to import from: a folder, or `links` to packages by the name of their file.

    `preload`: modules that are imported once, before programs are forked from that.
    """

    folder: Path | None = None
    links: dict[str, Path] = field(default_factory=dict)
    preload: tuple[str, ...] = ()

    def lay(self, place: Path) -> tuple[str, list[str]]:
        """(entry for `sys.path`, "" without packages; paths to be readable)."""
        if self.folder is not None:
            return str(self.folder), [str(self.folder)]
        if not self.links:
            return "", []
        place.mkdir()
        for name, target in self.links.items():
            (place / name).symlink_to(target)
        return str(place), [str(place), *(str(target) for target in self.links.values())]


NO_PACKAGES = Packages()


def find(wanted: Sequence[str] | Path) -> Packages:
    """Packages by their names here, with what they require; or a folder of packages.

    UsageError where one is not there.
    """
    if isinstance(wanted, Path):
        folder = wanted.resolve()
        if not folder.is_dir():
            raise UsageError(f"packages={str(wanted)!r} is not a folder; give names or a folder")
        if Path(tempfile.gettempdir()).resolve().is_relative_to(folder):
            raise UsageError(f"packages={str(wanted)!r} holds temporary files; give another folder")
        return Packages(folder)
    if isinstance(wanted, str):
        raise UsageError(f"packages={wanted!r} is one text; give a tuple of names, or a Path")
    named = [_distribution(name) for name in wanted]
    links: dict[str, Path] = {}
    preload = []
    for distribution in _with_requirements(named):
        tops = _tops(distribution)
        links |= tops
        if distribution in named:
            found = [n for n, path in tops.items() if (path / "__init__.py").exists()]
            preload += [_MAIN_MODULE.get(name, name) for name in found]
            if not any(_importable(path) for path in tops.values()):
                raise UsageError(
                    f"package {distribution.name!r} is not installed in a folder of packages but "
                    "linked from elsewhere; give the folder"
                )
    return Packages(None, links, tuple(preload))


def _distribution(name: str) -> metadata.Distribution:
    """By the name it is installed by, or the one it is imported by."""
    try:
        return metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        known = metadata.packages_distributions().get(name)
    if not known:
        raise UsageError(f"package {name!r} is not installed here; pip install {name}")
    return metadata.distribution(known[0])


def _with_requirements(named: list[metadata.Distribution]) -> list[metadata.Distribution]:
    """With those that are required and installed, each once."""
    found: dict[str, metadata.Distribution] = {}
    todo = list(named)
    while todo:
        distribution = todo.pop(0)
        if distribution.name in found:
            continue
        found[distribution.name] = distribution
        for requirement in distribution.requires or []:
            name, _, marker = requirement.partition(";")
            match = _NAME.match(name)
            if match and "extra" not in marker:
                try:
                    todo.append(metadata.distribution(match[0]))
                except metadata.PackageNotFoundError:
                    continue  # for another system or version of Python
    return list(found.values())


def _tops(distribution: metadata.Distribution) -> dict[str, Path]:
    """The files and folders right below the folder it is installed in."""
    names = {file.parts[0] for file in distribution.files or []}
    if not names:  # as Debian installs them
        listed = distribution.read_text("top_level.txt") or distribution.name
        names = {n for top in listed.split() for n in (top, f"{top}.py")}
    paths = {n: Path(str(distribution.locate_file(n))) for n in names if n[0] not in "./"}
    return {n: p.resolve() for n, p in paths.items() if n != "__pycache__" and p.exists()}


def _importable(path: Path) -> bool:
    if path.name.startswith("__editable__") or path.suffix in (".dist-info", ".egg-info", ".pth"):
        return False
    return path.is_dir() or path.suffix in (".py", ".so")
