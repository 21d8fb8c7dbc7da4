"""Checks a macOS wheel on a machine that cannot load it.

    python -m cross.verify WHEEL FOLDER...

Each folder holds the wheels (mlx, mlx-metal, nanobind-backend) that pip would install beside it
on one macOS. One line per check; the status is 1 if any failed.
"""

from __future__ import annotations

import importlib
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import acceptance, evidence, macho

EXTENSION = "optiq/_ext.abi3.so"
LIBMLX = "@rpath/libmlx.dylib"
RPATH = "@loader_path/../mlx/lib"  # from optiq/ to mlx/, both in site-packages
MINOS = (14, 0)


class Failed(Exception):
    """Says what is wrong, in one line."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Failed(message)


@dataclass
class Neighbour:
    """What one macOS's mlx wheels offer the extension."""

    name: str
    exports: set[str]
    install_name: str
    keys: set[bytes]  # that nanobind shares types by, in mlx and in nanobind-backend


def neighbour(folder: Path) -> Neighbour:
    library = macho.read(_member(folder, "mlx_metal-*.whl", "mlx/lib/libmlx.dylib"))
    core = _member(folder, "mlx-*.whl", "mlx/core*.so")
    backend = _member(folder, "nanobind_backend-*.whl", "nanobind_backend/_nb_backend*.so")
    key = re.compile(rb"nanobind_\w+_v\d+\b")
    keys = set(key.findall(core)) & set(key.findall(backend))
    return Neighbour(folder.name, library.exports, library.install_name, keys)


def _member(folder: Path, wheel: str, member: str) -> bytes:
    for path in folder.glob(wheel):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if Path(name).match(member):
                    return archive.read(name)
    raise Failed(f"{folder} has no {wheel} with {member}; run make wheel-macos")


# --- the extension -------------------------------------------------------------------------------


def check_header(image: macho.Image) -> str:
    require(image.file_type == macho.BUNDLE, f"file type {image.file_type} is no bundle")
    require(image.minos == MINOS, f"built for macOS {image.minos}, not {MINOS}")
    return "arm64 bundle for macOS 14.0"


def check_libraries(image: macho.Image) -> str:
    unknown = set(image.libraries) - {LIBMLX, *evidence.LIBRARIES}
    require(not unknown, f"links to {', '.join(sorted(unknown))}")
    require(image.rpaths == [RPATH], f"the rpath is {image.rpaths}, not {RPATH}")
    return f"{len(image.libraries)}, libmlx.dylib by {RPATH}"


def check_exports(image: macho.Image) -> str:
    require(image.exports == {"_PyInit__ext"}, f"exports {sorted(image.exports)[:5]}")
    return "PyInit__ext alone"


def check_signature(image: macho.Image) -> str:
    signature = image.signature
    require(signature is not None, "none, and arm64 Macs load nothing unsigned")
    assert signature is not None
    require(signature.ad_hoc, "not ad hoc")
    require(signature.limit == signature.begins, "does not cover all before it")
    require(signature.ends == len(image.data), "is not the end of the file")
    wrong = signature.wrong_pages
    require(not wrong, f"the file was changed after signing, in page {wrong[:1]}")
    return f"ad hoc, every page hash of {signature.limit} bytes is right"


def check_imports(image: macho.Image, neighbours: Iterable[Neighbour], python: set[str]) -> str:
    """Every symbol exists in the very library that dyld will look in."""
    neighbours = list(neighbours)
    seen, counts, wrong = (
        evidence.seen(),
        dict.fromkeys(("mlx", "seen", "declared", "python"), 0),
        [],
    )
    bound = {i.name for i in image.imports}
    unlisted = bound - {i.name for i in image.undefined}
    require(not unlisted, f"the symbol table does not list {unlisted}, which dyld binds")
    # LLD lists one more than is bound, dyld's own helper of old.
    for wanted in image.imports + [i for i in image.undefined if i.name not in bound]:
        # A search through all images: weak C++ symbols and Python's, which the program exports.
        libraries = [wanted.library] if wanted.library else [LIBMLX, *evidence.LIBRARIES]
        if LIBMLX in libraries and all(wanted.name in n.exports for n in neighbours):
            counts["mlx"] += 1
        elif any(wanted.name in seen.get(library, ()) for library in libraries):
            counts["seen"] += 1
        elif any(wanted.name in evidence.DECLARED.get(library, ()) for library in libraries):
            counts["declared"] += 1
        elif not wanted.library and wanted.name in python:
            counts["python"] += 1
        else:
            lacking = [n.name for n in neighbours if wanted.name not in n.exports]
            where = (
                f"libmlx of {', '.join(lacking)}"
                if wanted.library == LIBMLX
                else (wanted.library or "any library")
            )
            wrong.append(f"{wanted.name} is not known to be in {where}")
    require(not wrong, "; ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if wrong[5:] else ""))
    require(counts["mlx"] > 0, "nothing of libmlx is used")
    return (
        f"{counts['mlx']} in libmlx of {', '.join(n.name for n in neighbours)}; {counts['seen']} "
        f"that wheels built on Macs use on macOS 14; {counts['declared']} that libc++ declares for "
        f"macOS 11; {counts['python']} of Python's stable interface"
    )


def check_metal(image: macho.Image, sources: Iterable[Path]) -> str:
    """The Metal path was compiled in, and the kernels with it."""
    calls = [i for i in image.imports if "3mlx4core5metal" in i.name]
    names = [source.name for source in sources]
    missing = [name for name in names if name.encode() + b"\0" not in image.data]
    require(not missing, f"not embedded: {', '.join(missing)}")
    require(bool(calls) or not names, "there are kernels, but nothing of mlx's Metal is called")
    return f"{len(names)} sources embedded, {len(calls)} functions of mlx::core::metal called"


def check_neighbours(neighbours: Iterable[Neighbour]) -> str:
    for n in neighbours:
        require(n.install_name == LIBMLX, f"libmlx of {n.name} is called {n.install_name}")
        require(len(n.keys) == 1, f"on {n.name} mlx and nanobind-backend share no types: {n.keys}")
    keys = {key.decode() for n in neighbours for key in n.keys}
    return f"mlx and nanobind-backend share types by {', '.join(keys)}"


# --- the wheel -----------------------------------------------------------------------------------


def check_contents(wheel: Path, pins: Iterable[str]) -> str:
    require(
        re.fullmatch(r"optiq_mlx-[\w.]+-cp310-abi3-macosx_14_0_arm64\.whl", wheel.name) is not None,
        "the name or a tag in it is wrong",
    )
    with zipfile.ZipFile(wheel) as archive:
        bad = archive.testzip()
        require(bad is None, f"{bad} is damaged")
        names = archive.namelist()
        native = [n for n in names if n.endswith((".so", ".dylib", ".a", ".o"))]
        require(native == [EXTENSION], f"native files are {native}, not {EXTENSION} alone")
        metadata = next(n for n in names if n.endswith(".dist-info/METADATA"))
        wanted = re.findall(
            r"^Requires-Dist: (\S+?);?(?:\s|$)", archive.read(metadata).decode(), re.M
        )
    for pin in pins:
        require(pin in wanted, f"does not require {pin}, which was checked against")
    return f"{len(names)} files, one native; requires {', '.join(pins)}"


def python_symbols() -> set[str]:
    """What nanobind's list lets an extension take from the program that loads it."""
    nanobind = importlib.import_module("nanobind")  # among the tools alone
    text = (Path(nanobind.cmake_dir()) / "darwin-ld-cpython.sym").read_text()
    return set(re.findall(r"-U (\S+)", text))


def checks(wheel: Path, folders: list[Path]) -> Iterator[tuple[str, Callable[[], str]]]:
    """In an order in which the first failure is the cause of the later ones."""
    neighbours = [neighbour(folder) for folder in folders]
    mlx = next(folders[0].glob("mlx-*.whl")).name.split("-")[1]
    backend = next(folders[0].glob("nanobind_backend-*.whl")).name.split("-")[1]
    pins = [f"mlx=={mlx}", f"nanobind-backend=={backend}"]
    yield "wheel", lambda: check_contents(wheel, pins)
    with zipfile.ZipFile(wheel) as archive:
        image = macho.read(archive.read(EXTENSION))
    yield "header", lambda: check_header(image)
    yield "libraries", lambda: check_libraries(image)
    yield "exports", lambda: check_exports(image)
    yield "imports", lambda: check_imports(image, neighbours, python_symbols())
    metal = Path(__file__).parents[1] / "metal"
    yield "metal", lambda: check_metal(image, sorted(metal.glob("*.metal")))
    yield "neighbours", lambda: check_neighbours(neighbours)
    yield "signature", lambda: check_signature(image)
    for name, command in acceptance.COMMANDS.items():
        yield name, lambda command=command: command(wheel)  # type: ignore[misc]


def main(wheel: Path, folders: list[Path]) -> int:
    passed = failed = 0
    for name, check in checks(wheel, folders):
        try:
            print(f"ok    {name}: {check()}")
            passed += 1
        except (Failed, macho.Malformed, acceptance.Refused) as problem:
            print(f"FAIL  {name}: {problem}")
            failed += 1
    print(f"{passed} passed, {failed} failed: {wheel.name}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]]))
