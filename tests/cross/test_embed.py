"""cmake/embed_metal.cmake: includes flattened once, ASCII only, a hash for each text."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake") or shutil.which(ROOT / "build/cross/tools/bin/cmake")
pytestmark = pytest.mark.skipif(CMAKE is None, reason="no cmake to run; apt-get install cmake")

COMMON = """#pragma once
#include <metal_stdlib>
// a "word"; [[ ]] \\n @entries@ ${name} ;;
#define TWO(x) \\
  (x)
"""


def embed(folder: Path, **files: str) -> dict[str, tuple[str, str]]:
    """File name -> (hash, text), of files given with _ for the dot."""
    sources = folder / "metal"
    sources.mkdir()
    for name, text in files.items():
        (sources / name.replace("_", ".")).write_text(text)
    out = folder / "metal_source.cpp"
    script = ROOT / "cmake" / "embed_metal.cmake"
    assert CMAKE is not None
    done = subprocess.run(
        [CMAKE, f"-DSOURCE_DIR={sources}", f"-DOUT={out}", "-P", str(script)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise ValueError(" ".join(done.stderr.split()))
    entry = re.compile(r'\{"(\S+)", "(\w+)", R"MSL\((.*?)\)MSL"\}', re.DOTALL)
    return {name: (digest, text) for name, digest, text in entry.findall(out.read_text())}


def test_each_file_comes_once_and_before_its_users(tmp_path: Path) -> None:
    found = embed(
        tmp_path,
        common_h=COMMON,
        a_h='#pragma once\n#include "common.h"\nstruct A {};\n',
        k_metal='#include "a.h"\n  # include "common.h" // again\nA a;\n',
    )
    assert set(found) == {"common.h", "a.h", "k.metal"}
    text = found["k.metal"][1]
    once = COMMON.removeprefix("#pragma once\n")
    assert text.count(once) == 1
    assert text.index(once) < text.index("struct A {};") < text.index("A a;")
    assert 'include "' not in text
    assert "pragma once" not in text


def test_files_that_include_each_other_end(tmp_path: Path) -> None:
    found = embed(
        tmp_path, a_h='#include "b.h"\nint a;\n', b_h='#include "a.h"\nint b;\n', k_metal="int k;"
    )
    assert found["a.h"][1].split() == ["int", "b;", "int", "a;"]
    assert found["k.metal"] == (hashlib.sha256(b"int k;").hexdigest()[:16], "int k;")


def test_the_hash_follows_an_included_file(tmp_path: Path) -> None:
    digests = set()
    for constant in ("1", "2"):
        folder = tmp_path / constant
        folder.mkdir()
        found = embed(folder, a_h=f"int a = {constant};\n", k_metal='#include "a.h"\n')
        digests.add(found["k.metal"][0])
    assert len(digests) == 2


def test_no_kernels_is_no_error(tmp_path: Path) -> None:
    assert embed(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int a;\n// \u00b5s\n", r"metal/a\.h:2: not ASCII"),
        ('#include "gone.h"\n', r"metal/gone\.h: no such file"),
        ('// )MSL"\n', "end mark"),
    ],
)
def test_what_metal_could_not_read_stops_the_build(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed(tmp_path, a_h=text)
