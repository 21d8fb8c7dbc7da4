"""The checks of the macOS wheel notice what they are there for."""

from __future__ import annotations

import dataclasses
import shutil
import struct
import zipfile
from pathlib import Path

import pytest

from cross import evidence, macho, stubs, verify
from tests.cross.tiny import PAGE, Tiny

ROOT = Path(__file__).parents[2]
MLX = {"__ZN3mlx4core4evalEv"}
KEY = {b"nanobind_system_libcpp_abi1_a1_v22"}
NEIGHBOURS = [verify.Neighbour(name, MLX, verify.LIBMLX, KEY) for name in ("14", "15")]
PYTHON = {"_PyModule_New"}


def everything(data: bytes, neighbours: list[verify.Neighbour] = NEIGHBOURS) -> None:
    image = macho.read(data)
    verify.check_header(image)
    verify.check_libraries(image)
    verify.check_exports(image)
    verify.check_imports(image, neighbours, PYTHON)
    verify.check_metal(image, [])
    verify.check_neighbours(neighbours)
    verify.check_signature(image)


def test_a_good_bundle_passes() -> None:
    everything(Tiny().build())


GOOD = Tiny()
DEFECTS = {
    "library": (Tiny(file_type=6), "no bundle"),
    "older-macos": (Tiny(minos=(13, 0)), r"macOS \(13, 0\)"),
    "newer-macos": (Tiny(minos=(15, 0)), r"macOS \(15, 0\)"),
    "rpath": (Tiny(rpath="@loader_path/../../mlx/lib"), "rpath"),
    "own-libc++": (Tiny(libraries=[*GOOD.libraries, "@rpath/libc++.1.dylib"]), "links to @rpath"),
    "exports": (Tiny(exports=["_PyInit__ext", "_cblas_sgemm"]), "exports"),
    "no-init": (Tiny(exports=[]), "exports"),
    "unknown-mlx": (Tiny(imports=[*GOOD.imports, ("_gone", 1)]), "_gone .* libmlx of 14, 15"),
    "unknown-libc++": (Tiny(imports=[*GOOD.imports, ("_new", 2)]), "_new .*libc"),
    # exists, but not where dyld will look
    "wrong-library": (Tiny(imports=[*GOOD.imports, ("__ZN3mlx4core4evalEv", 3)]), "libSystem"),
    "not-python": (Tiny(imports=[*GOOD.imports, ("_PyPrivate", -2)]), "_PyPrivate .* any library"),
    "no-mlx": (Tiny(imports=[("__Znwm", 2)]), "nothing of libmlx"),
    "unlisted": (Tiny(unlisted=["__ZN3mlx4core5otherEv"]), "does not list"),
    "unsigned": (Tiny(signed=False), "unsigned"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_is_named(name: str) -> None:
    tiny, message = DEFECTS[name]
    with pytest.raises(verify.Failed, match=message):
        everything(tiny.build())


@pytest.mark.parametrize("at", [PAGE - 1, PAGE + 100, 2 * PAGE - 1])
def test_one_changed_byte_breaks_the_signature(at: int) -> None:
    data = bytearray(Tiny().build())
    data[at] ^= 1
    with pytest.raises(verify.Failed, match=rf"changed after signing, in page \[{at // PAGE}\]"):
        everything(bytes(data))


def test_bytes_after_the_signature_are_refused() -> None:
    with pytest.raises(verify.Failed, match="end of the file"):
        everything(Tiny().build() + b"\0")


@pytest.mark.parametrize("length", [0, 3, 31, 40, 200, 2 * PAGE + 20])
def test_a_cut_file_is_malformed_and_no_crash(length: int) -> None:
    with pytest.raises(macho.Malformed):
        everything(Tiny().build()[:length])


def test_another_processor_is_refused() -> None:
    data = bytearray(Tiny().build())
    data[4:8] = struct.pack("<I", 0x01000007)  # x86-64
    with pytest.raises(macho.Malformed, match="arm64"):
        macho.read(bytes(data))


def test_a_symbol_that_one_mlx_lacks_is_named_with_it() -> None:
    lacking = [NEIGHBOURS[0], verify.Neighbour("26", set(), verify.LIBMLX, KEY)]
    with pytest.raises(verify.Failed, match="libmlx of 26"):
        everything(Tiny().build(), lacking)


def test_mlx_and_the_backend_must_share_a_key() -> None:
    apart = [dataclasses.replace(NEIGHBOURS[0], keys=set())]
    with pytest.raises(verify.Failed, match="share no types"):
        everything(Tiny().build(), apart)


def test_kernels_must_be_embedded_and_used() -> None:
    image = macho.read(Tiny().build())
    with pytest.raises(verify.Failed, match=r"not embedded: qmv\.metal"):
        verify.check_metal(image, [Path("qmv.metal")])


# --- evidence and stubs --------------------------------------------------------------------------


def test_only_what_runs_on_macos_14_is_evidence() -> None:
    old = macho.read(Tiny(minos=(11, 0)).build())
    new = macho.read(Tiny(imports=[("_since_15", 3)], minos=(15, 0)).build())
    found = evidence.collect([old, new])
    assert found["/usr/lib/libc++.1.dylib"] == {"__Znwm": "11.0"}
    assert found["/usr/lib/libSystem.B.dylib"] == {}


def test_the_kept_evidence_is_of_macos_14_at_most_and_what_is_declared_is_not_in_it() -> None:
    import json

    record = json.loads(evidence.FILE.read_text())
    versions = {v for symbols in record["symbols"].values() for v in symbols.values()}
    assert all(tuple(map(int, v.split("."))) <= evidence.NEWEST for v in versions)
    for library, symbols in evidence.DECLARED.items():
        assert not symbols & evidence.seen()[library]  # seen is better: then drop it there


def test_stubs_export_the_evidence_alone() -> None:
    text = stubs.stub("/usr/lib/libobjc.A.dylib", {"_objc_msgSend", "_OBJC_CLASS_$_NSObject"})
    assert "'_objc_msgSend'" in text
    assert "NSObject" not in text
    assert "install-name: '/usr/lib/libobjc.A.dylib'" in text


# --- the wheel itself ----------------------------------------------------------------------------


def build() -> tuple[Path, list[Path]]:
    wheels = sorted((ROOT / "dist").glob("optiq_mlx-*-macosx_14_0_arm64.whl"))
    folders = sorted((ROOT / "build" / "cross").glob("macos-[0-9]*_0"))
    if not wheels or len(folders) < 3:
        pytest.skip("no macOS wheel was built here; make wheel-macos")
    return wheels[-1], folders


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    wheel, folders = build()
    pins = [f"mlx=={next(folders[0].glob('mlx-*.whl')).name.split('-')[1]}"]
    verify.check_contents(wheel, pins)
    with pytest.raises(verify.Failed, match=r"does not require mlx==0\.1"):
        verify.check_contents(wheel, ["mlx==0.1"])
    renamed = tmp_path / wheel.name.replace("14_0", "13_0")
    shutil.copy(wheel, renamed)
    with pytest.raises(verify.Failed, match="tag"):
        verify.check_contents(renamed, pins)
    damaged = tmp_path / wheel.name
    shutil.copy(wheel, damaged)
    with zipfile.ZipFile(damaged, "a") as archive:
        archive.writestr("optiq/libextra.dylib", b"")
    with pytest.raises(verify.Failed, match=r"libextra\.dylib"):
        verify.check_contents(damaged, pins)


def test_the_built_extension_with_one_changed_byte_is_refused() -> None:
    wheel, _ = build()
    with zipfile.ZipFile(wheel) as archive:
        data = bytearray(archive.read(verify.EXTENSION))
    verify.check_signature(macho.read(bytes(data)))
    data[len(data) // 2] ^= 1
    with pytest.raises(verify.Failed, match="changed after signing"):
        verify.check_signature(macho.read(bytes(data)))


def test_a_symbol_taken_from_the_built_extensions_mlx_is_missed() -> None:
    wheel, folders = build()
    with zipfile.ZipFile(wheel) as archive:
        image = macho.read(archive.read(verify.EXTENSION))
    used = next(i.name for i in image.imports if i.library == verify.LIBMLX)
    neighbours = [verify.neighbour(folder) for folder in folders]
    python = {i.name for i in image.imports if i.name.startswith(("_Py", "__Py"))}
    verify.check_imports(image, neighbours, python)
    neighbours[-1].exports.discard(used)
    with pytest.raises(verify.Failed, match=used.replace("$", r"\$")):
        verify.check_imports(image, neighbours, python)
