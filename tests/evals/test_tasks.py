"""What the benchmarks ask and how they judge, by hand and against lm-eval's definitions."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optiq.errors import EvalError, OptiqError
from optiq.evals import data, humaneval
from optiq.evals.engine import Engine
from optiq.evals.tasks.bfcl import Bfcl, json_schema
from optiq.evals.tasks.generation import without_thought
from optiq.evals.tasks.gsm8k import Gsm8k
from optiq.evals.tasks.humaneval import HumanEval, Outcome
from optiq.evals.tasks.ifeval import IfEval
from optiq.evals.tasks.mmlu import Mmlu
from optiq.runtime.loading import load
from tests.evals import questions
from tests.tiny import BOS, tiny_folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load(str(tiny_folder(tmp_path_factory.mktemp("tasks"))))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return questions.write(tmp_path / "data", monkeypatch)


@pytest.fixture(params=["chat", "no template"])
def engine(request: pytest.FixtureRequest, loaded: tuple[Any, Any], tmp_path: Path) -> Engine:
    if request.param == "chat":
        return Engine(*loaded)
    folder = tiny_folder(tmp_path)
    config = folder / "tokenizer_config.json"
    config.write_text(
        re.sub(r'"chat_template": ".*"', '"model_max_length": 512', config.read_text())
    )
    engine = Engine(*load(str(folder)))
    assert not engine.has_chat
    return engine


def asked(engine: Engine, task: Any) -> str:
    """The first prompt as text."""
    prompt = task.prompt(engine, task.waves[0][0])
    assert prompt.tokens.count(BOS) == 1
    return str(engine.tokenizer.decode(prompt.tokens)).removeprefix("<|bos|>")


def test_mmlu_asks_as_lm_eval_does(loaded: Any, root: Path, monkeypatch: Any) -> None:
    found = data.load("mmlu", root)
    task = Mmlu(found, ["world_history/test/1", "astronomy/test/2", "astronomy/test/0"])
    assert [[item.id for item in wave] for wave in task.waves] == [
        ["astronomy/test/0", "astronomy/test/2"],
        ["world_history/test/1"],
    ]
    seen: list[Any] = []

    def likelihoods(self: Engine, contexts: Any, endings: Any) -> list[list[float]]:
        seen.extend(zip(contexts, endings, strict=True))
        return [[-3.0, -1.0, -1.0, -2.0] for _ in contexts]

    monkeypatch.setattr(Engine, "log_likelihoods", likelihoods)
    engine = Engine(*loaded)
    records = task.run(engine, task.waves[1])
    expected = "The following are multiple choice questions (with answers) about world history.\n\n"
    for i in range(5):
        expected += (
            f'Is world_history no. {i}, here," odd?"\nA.  yes{i}\nB. no\nC. maybe\nD. both\n'
            f"Answer: {'ABCD'[i % 4]}\n\n"
        )
    expected += 'Is world_history no. 1, here," odd?"\nA.  yes1\nB. no\nC. maybe\nD. both\nAnswer:'
    ((context, endings),) = seen
    for letter, ending in zip("ABCD", endings, strict=True):
        assert engine.tokenizer.decode(context + ending) == f"<|bos|>{expected} {letter}"
        assert context + ending == engine.text(f"{expected} {letter}")
        assert ending
    assert (records[0].answer, records[0].metrics) == ("B", {"accuracy": True})  # the first of two
    assert records[0].group == "world_history"


def test_mmlu_needs_letters(root: Path) -> None:
    deaf = SimpleNamespace(encode=lambda text: [0])
    task = Mmlu(data.load("mmlu", root), ["astronomy/test/2"])
    with pytest.raises(EvalError, match="knows no letters A to D"):
        task.run(Engine(None, deaf), task.waves[0])  # type: ignore[arg-type]


LM_EVAL_STRICT = re.compile(r"The answer is (\-?[0-9\.\,]+).")
LM_EVAL_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def lm_eval(text: str, target: str) -> dict[str, bool]:
    """The filters and the exact_match of lm-eval's gsm8k-cot.yaml, in its order."""

    def normal(text: str) -> str:
        for pattern in (",", r"\$", "(?s).*#### ", r"\.$"):
            text = re.sub(pattern, "", text)
        return text.lower()

    first = LM_EVAL_STRICT.search(text)
    last = LM_EVAL_FLEXIBLE.findall(text)
    strict = first[1].strip() if first else "[invalid]"
    flexible = next(m for m in last[-1] if m).strip() if last else "[invalid]"
    gold = normal(target.split("####")[-1].strip())
    return {"strict": normal(strict) == gold, "flexible": normal(flexible) == gold}


@pytest.mark.parametrize(
    "answer",
    [
        "So 9 * 2 = 18. The answer is 18.",
        "The answer is 1,018.",
        "The answer is $18.",
        "The answer is 18",
        "The answer is 18 dollars.",
        "The answer is -18.",
        "The answer is 18. The answer is 7.",
        "The answer is 7. No: The answer is 18.",
        "the answer is 18.",
        "#### 18",
        "\\boxed{18}",
        "It is 18.5.",
        "18,",
        "$18",
        "He pays $1,018.50 on the 18.",
        "no number",
        "...",
        "-18",
        "18th",
        "The answer is 18.\n\nQ: what is 3?",
    ],
)
@pytest.mark.parametrize("target", ["9*2=18\n#### 18", "#### 1,018", "x\n#### -18"])
def test_gsm8k_scores_as_lm_eval_does(root: Path, answer: str, target: str) -> None:
    item: Any = SimpleNamespace(data={"answer": target})
    task = Gsm8k(data.load("gsm8k", root), ["test/1"], chat=True)
    assert task.score(item, answer) == (lm_eval(answer, target), "")


@pytest.mark.parametrize(
    ("answer", "strict"),
    [
        ("The answer is 18. Great job...", True),
        ("The answer is 18...", True),
        ("The answer is 18.00.", True),
        ("It is ...18.", False),
        ("It costs $18.00.", False),
        ("18, well done.,.", False),
        ("It is 18.0", False),
    ],
)
def test_gsm8k_scores_as_a_person_would_where_lm_eval_does_not(
    root: Path, answer: str, strict: bool
) -> None:
    item: Any = SimpleNamespace(data={"answer": "9*2=18\n#### 18"})
    task = Gsm8k(data.load("gsm8k", root), ["test/1"], chat=True)
    assert task.score(item, answer) == ({"strict": strict, "flexible": True}, "")
    assert lm_eval(answer, "#### 18") != task.score(item, answer)[0]
    assert not task.score(item, answer.replace("18", "180"))[0]["flexible"]


def test_gsm8k_prompt(engine: Engine, root: Path) -> None:
    task = Gsm8k(data.load("gsm8k", root), ["test/3"], chat=engine.has_chat)
    text = asked(engine, task)
    assert text.count("Q: ") == 4
    assert len(re.findall(r"The answer is \d+\.", text)) == 3
    question = "Q: What is 3 and 3?\nA:"
    if engine.has_chat:
        assert text.endswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        assert text.count("<|im_start|>assistant") == 4
    else:
        assert text.endswith(f"The answer is 39.\n\n{question}")
    stop = task.prompt(engine, task.waves[0][0]).stop
    assert stop is not None
    assert stop("It is 6. The answer is 6.\n\nQ: What") == 27
    assert stop("It is 6. The answer is 6.") is None


def test_ifeval(engine: Engine, root: Path) -> None:
    task = IfEval(data.load("ifeval", root), ["12"], chat=engine.has_chat)
    text = asked(engine, task)
    prompt = "Write 2 words, \u2028 no commas."
    if engine.has_chat:
        assert text == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    else:
        assert text == prompt
    item = task.waves[0][0]
    assert task.score(item, "Sure, here\n<<a title>> two words")[0] == {
        "prompt_strict": False,
        "prompt_loose": True,
        "instructions_strict": [False, True],
        "instructions_loose": [True, True],
    }


def test_bfcl(engine: Engine, root: Path) -> None:
    task = Bfcl(data.load("bfcl", root), ["simple_0"], engine.tokenizer)
    assert ("'native'" if engine.has_chat else "'plain'") in task.protocol
    text = asked(engine, task)
    for part in ('"shop.price"', '"number"', '"object"', "What does a kite cost?"):
        assert part in text
    assert '"dict"' not in text
    item = task.waves[0][0]
    right = '<tool_call>\n{"name": "shop.price", "arguments": {"thing": "Kite"}}\n</tool_call>'
    assert task.score(item, right) == ({"ast": True}, "")
    for wrong in (
        "<tool_call>\n{not JSON\n</tool_call>",
        "I cannot",
        right.replace("ing", ""),
        "{",
    ):
        metrics, note = task.score(item, wrong)
        assert metrics == {"ast": False}
        assert note
        assert "\n" not in note


def test_bfcls_types_as_json_schema() -> None:
    assert json_schema(questions.FUNCTION["parameters"]) == {  # type: ignore[arg-type]
        "type": "object",
        "properties": {
            "thing": {"type": "string", "description": "which"},
            "weights": {"type": "array", "items": {"type": "number"}},
        },
        "required": ["thing"],
    }
    # A parameter may be called "type".
    nested = {"type": "dict", "properties": {"type": {"type": "tuple"}, "items": {"type": "any"}}}
    assert json_schema(nested)["properties"] == {
        "type": {"type": "array"},
        "items": {"type": "string"},
    }


def run_here(code: str, test: str, entry_point: str) -> Outcome:
    """Runs code that this file wrote, without a sandbox."""
    ours: dict[str, Any] = {}
    checks: dict[str, Any] = {}
    try:
        exec(code, ours)
        exec(test, checks)
        checks["check"](ours[entry_point])
    except Exception as error:
        return Outcome(False, f"failed: {type(error).__name__}")
    return Outcome(True)


def test_humaneval(engine: Engine, root: Path) -> None:
    task = HumanEval(
        data.load("humaneval", root), ["HumanEval/1"], chat=engine.has_chat, run_program=run_here
    )
    text = asked(engine, task)
    item = task.waves[0][0]
    prompt = item.data["prompt"]
    stop = task.prompt(engine, item).stop
    assert stop is not None
    if not engine.has_chat:
        assert text == prompt.rstrip()
        answer = "\n    return helper(2) * x\n\n\nprint(double1(3))\n"
        assert stop(answer) == answer.index("\nprint")
        assert task.score(item, answer[: stop(answer)]) == ({"pass": True}, "")
        assert task.score(item, "\n    return x") == ({"pass": False}, "failed: AssertionError")
        return
    assert f"```python\n{prompt}```" in text
    code = "def double1(x):\n    return helper(math.floor(2)) * x\n"
    answer = f"First:\n```python\nprint(1)\n```\nThen:\n```python\n{code}```\nIt doubles."
    assert stop(answer) == answer.index("\nIt doubles")
    assert stop(answer[: stop(answer)]) is None  # the line of the fence is not over
    assert task.score(item, answer[: stop(answer)]) == ({"pass": True}, "")
    assert task.score(item, "I would rather not.") == (
        {"pass": False},
        "no code that defines double1",
    )


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\ndef f():\n    pass\n```", "def f():\n    pass"),
        ("```\ndef f():\n    pass\n```", "def f():\n    pass"),
        ("```python\ndef f():\n    return 1", "def f():\n    return 1"),  # cut by the token limit
        ("```python\ndef f(): 1\n```\n```python\ndef f(): 2\n```", "def f(): 2"),
        ("```python\ndef f(): 1\n```\n```python\nassert f() == 1\n```", "def f(): 1"),
        ("```python\nclass A:\n    def f(self): 1\n```", "class A:\n    def f(self): 1"),
        ("def f():\n    return '`'", "def f():\n    return '`'"),
        ("1. So:\n\n   ```python\n   def f():\n       pass\n   ```\n", "def f():\n    pass"),
        ("- So:\n\t```\n\tdef f():\n\t\tpass\n\t```\n", "def f():\n\tpass"),
        ("```\n    def f():\n        pass\n```", "def f():\n    pass"),
        ("   ```\n   def f():\n       '''\n  x'''\n   ```", "def f():\n    '''\nx'''"),
        ("````\ndef f():\n    pass\n````", "def f():\n    pass"),
        *(
            (f"So:\n```python\n{code}\n```\nHere ``` is.", code)
            for code in (
                'def f():\n    """\n    ```\n    f()\n    ```\n    """\n    return 1',
                "def f():\n    '''\n    ```python\n    f()\n    ```\n    '''\n    return 1",
                'def f():\n    return \'"""\'  # it\'s """',
            )
        ),
        ('```\ndef f():\n    """\n    pass\n```\nDone.', 'def f():\n    """\n    pass'),
        ("```python\ndef ff(): 1\n```", None),
        ("Use f().", None),
        ("```python\nf()\n```\ndef f", None),
        ("", None),
    ],
)
def test_code_of_an_answer(text: str, code: str | None) -> None:
    assert humaneval.extract(text, "f") == code


def test_an_answer_goes_on_after_a_fence_in_a_docstring() -> None:
    fence = "    ```\n"
    code = f'def f():\n    """\n{fence}    f()\n{fence}    """\n    return 1\n'
    whole = f"```python\n{code}```\n"
    stops = [humaneval.instruct_stop(whole[:i], "f") for i in range(len(whole) + 1)]
    assert stops == [None] * len(whole) + [len(whole) - 1]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("<think>\n2?\n</think>\n\nIt is 2.", "It is 2."),
        (" <think></think>2", "2"),
        ("<think> it never ends", ""),
        ("It is <think>2</think>.", "It is <think>2</think>."),
        ("2", "2"),
    ],
)
def test_thoughts_are_no_answer(answer: str, text: str) -> None:
    assert without_thought(answer) == text


@pytest.mark.parametrize("answer", ["", " \n", "<think>never ends"])
def test_an_empty_answer_is_a_verdict(
    loaded: Any, root: Path, monkeypatch: Any, answer: str
) -> None:
    monkeypatch.setattr(Engine, "answers", lambda self, prompts: [answer] * len(prompts))
    engine = Engine(*loaded)
    for task in (
        Gsm8k(data.load("gsm8k", root), ["test/1"], chat=True),
        IfEval(data.load("ifeval", root), ["12"], chat=True),
        Bfcl(data.load("bfcl", root), ["simple_0"], engine.tokenizer),
        HumanEval(data.load("humaneval", root), ["HumanEval/1"], chat=True, run_program=run_here),
    ):
        (record,) = task.run(engine, task.waves[0])
        assert record.note == "the answer is empty"
        assert record.answer == answer
        assert True not in record.metrics.values()


def test_a_crash_of_a_scorer_is_a_verdict(loaded: Any, root: Path, monkeypatch: Any) -> None:
    def crash(code: str, test: str, entry_point: str) -> Outcome:
        raise RecursionError("deep\nlines")

    monkeypatch.setattr(
        Engine, "answers", lambda self, prompts: ["```\ndef double1(x): 1\n```"] * len(prompts)
    )
    rows = data.load("humaneval", root)
    task = HumanEval(rows, ["HumanEval/1"], chat=True, run_program=crash)
    (record,) = task.run(Engine(*loaded), task.waves[0])
    assert record.metrics == {"pass": False}
    assert record.note == "cannot be scored: RecursionError deep lines"


def test_no_sandbox_is_no_verdict(loaded: Any, root: Path, monkeypatch: Any) -> None:
    def crash(code: str, test: str, entry_point: str) -> Outcome:
        raise OptiqError("none")

    monkeypatch.setattr(
        Engine, "answers", lambda self, prompts: ["```\ndef double1(x): 1\n```"] * len(prompts)
    )
    task = HumanEval(data.load("humaneval", root), ["HumanEval/1"], chat=True, run_program=crash)
    with pytest.raises(OptiqError):
        task.run(Engine(*loaded), task.waves[0])
