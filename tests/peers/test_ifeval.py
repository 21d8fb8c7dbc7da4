"""The same verdicts as lm-eval's IFEval on thousands of responses, the same tokens as NLTK."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from optiq.evals.ifeval import KINDS, check
from optiq.evals.ifeval.sentences import sentences
from optiq.evals.ifeval.words import words
from tests.peers.ifeval_answers import cases, texts
from tests.peers.packages import ask, install, pip

pytest.importorskip("langdetect", reason="the extra evals is not installed")
pytest.importorskip("punkt", reason="the extra evals is not installed")

ORACLE = Path(__file__).with_name("oracle_ifeval.py")
NEEDS = "lm-eval==0.4.13 nltk==3.9.2 langdetect==1.0.9 six regex immutabledict packaging"
PUNKT = "nltk_cache/tokenizers/punkt_tab/english/"


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folders of the packages and of NLTK's own data, which llama-index-core happens to carry."""
    folder = tmp_path_factory.mktemp("lm-eval")
    install(folder, *NEEDS.split())
    data = tmp_path_factory.mktemp("nltk-data")
    pip("download", "--quiet", "--no-deps", "--dest", str(data), "llama-index-core==0.14.25")
    punkt = data / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    (wheel,) = data.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if PUNKT in name:
                (punkt / Path(name).name).write_bytes(archive.read(name))
    return folder, str(data)


def test_the_verdicts_agree(peer: tuple[Path, str]) -> None:
    folder, data = peer
    asked = cases(2200, seed=1)
    theirs = ask(ORACLE, folder, asked, NLTK_DATA=data)
    seen = set()
    differences = []
    for (ids, kwargs, response), (strict, loose) in zip(asked, theirs, strict=True):
        verdict = check("", response, ids, kwargs)
        seen |= set(zip(ids, strict, loose, strict=True))
        if (verdict.strict, verdict.loose) != (strict, loose):
            differences.append((ids, kwargs, response, verdict, strict, loose))
    assert not differences, differences[:3]
    # The responses are no test of a kind unless they both follow it and break it.
    missing = {(k, v, v) for k in KINDS for v in (True, False)} - seen
    assert not missing
    assert sum(strict != loose for _, strict, loose in seen) >= 15


def test_the_tokens_agree(peer: tuple[Path, str]) -> None:
    folder, data = peer
    asked = texts(2000, seed=2)
    for text, (their_sentences, their_words) in zip(
        asked, ask(ORACLE, folder, asked, NLTK_DATA=data), strict=True
    ):
        assert sentences(text) == their_sentences, text
        assert words(text) == their_words, text
