"""The Python that the server runs: in every protocol, within bounds, and closed where it fails."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from optiq.errors import RequestError, SandboxUnavailable, UsageError
from optiq.sandbox import Sandbox
from optiq.serve.asked import Interpreter
from optiq.serve.options import Options
from optiq.serve.server import Server
from optiq.serve.tools.python import LIMITS, MOST_TOLD, Python
from tests.sandbox.campaign import AT_ONCE, access
from tests.sandbox.campaign import LIMITS as ATTACKED
from tests.sandbox.holding import holding
from tests.sandbox.programs import BOMBS, WRITTEN
from tests.serve.servers import MODEL, TOOLS, WEATHER, Asked, scripted, tiny_tokenizer, wait_until

CHAT = "/v1/chat/completions"
INTERPRETER = {"type": "code_interpreter"}
EXECUTION = {"type": "code_execution_20250825", "name": "code_execution"}
S = "chr(83)+'AY:'"  # what a program prints after it is what the model says next


def program(code: str) -> str:
    arguments = json.dumps({"code": code})
    return f'<tool_call>\n{{"name": "python", "arguments": {arguments}}}\n</tool_call>'


def say(code: str, before: str = "") -> dict[str, Any]:
    return {"role": "user", "content": f"SAY:{before}{program(code)}"}


@pytest.fixture(scope="module")
def runs() -> Iterator[Asked]:
    tokenizer = tiny_tokenizer(thinking=True)
    with scripted(tokenizer, context=20_000, tools=("python",), sandbox_packages=()) as asked:
        yield asked


def chat(server: Asked, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    body = {"messages": list(messages), "tools": [INTERPRETER], **fields}
    return dict(server.post(CHAT, body)["choices"][0])


def prompt_of(server: Asked) -> str:
    return str(server.tokenizer.decode(list(server.engine.requests[-1].tokens)))


def test_chat_runs_a_program_and_goes_on(runs: Asked) -> None:
    question = say(f"x = 6 * 7\nprint({S}, x)", before="Let me see. ")
    choice = chat(runs, question)
    assert choice["finish_reason"] == "stop"
    message = choice["message"]
    assert message["content"].endswith("42")
    (run,) = message["code_interpreter_calls"]
    assert (run["status"], run["outputs"][0]["logs"]) == ("completed", "SAY: 42")
    assert "tool_calls" not in message
    # The next turn goes on in the same session, and reads nothing again.
    before = len(runs.engine.requests[-1].tokens)
    body = {"messages": [question, message, say(f"print({S}, x + 1)")], "tools": [INTERPRETER]}
    answer = runs.post(CHAT, body)
    assert answer["choices"][0]["message"]["content"].endswith("43")
    assert (
        answer["choices"][0]["message"]["code_interpreter_calls"][0]["container_id"]
        == (run["container_id"])
    )
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > before


def test_chat_streams_what_happens(runs: Asked) -> None:
    messages = [say(f"print({S}, 'Done')", before="<think>\nHm\n</think>\n\nWell. ")]
    body = {"messages": messages, "tools": [INTERPRETER], "stream": True}
    *events, done = runs.events(CHAT, body)
    assert done == "[DONE]"
    deltas = [json.loads(e)["choices"][0]["delta"] for e in events]
    parts = [call for delta in deltas for call in delta.get("code_interpreter_calls", [])]
    assert [part["status"] for part in parts] == ["interpreting", "completed"]
    assert [part["index"] for part in parts] == [0, 0]
    assert parts[0]["content_offset"] == len("Well.")
    assert "".join(delta.get("content") or "" for delta in deltas).split() == ["Well.", "Done"]
    assert sum("finish_reason" in e and '"finish_reason":null' not in e for e in events) == 1


def test_responses(runs: Asked) -> None:
    read: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    fields = {"model": MODEL, "tools": [{**INTERPRETER, "container": {"type": "auto"}}]}
    body = {**fields, "input": [say(f"y = 5\nprint({S}, y)")], "stream": True}
    events = [read.validate_json(e, strict=True) for e in runs.events("/v1/responses", body)]
    kinds = [e.type.removeprefix("response.") for e in events]
    expected = [
        "output_item.added",
        "code_interpreter_call.in_progress",
        "code_interpreter_call_code.delta",
        "code_interpreter_call_code.done",
        "code_interpreter_call.interpreting",
        "code_interpreter_call.completed",
        "output_item.done",
    ]
    begin = kinds.index("output_item.added")
    assert kinds[begin : begin + len(expected)] == expected
    response = events[-1].response
    call, message = response.output
    assert (call.type, call.code, call.outputs[0].logs) == (
        "code_interpreter_call",
        f"y = 5\nprint({S}, y)",
        "SAY: 5",
    )
    assert message.content[0].text.strip() == "5"
    again = {**fields, "input": [say(f"print({S}, y + 1)")], "previous_response_id": response.id}
    answer = Response.model_validate_json(
        json.dumps(runs.post("/v1/responses", again)), strict=True
    )
    assert answer.output_text.strip() == "6"
    assert answer.output[0].model_dump()["container_id"] == call.container_id
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens > 0


def test_anthropic(runs: Asked) -> None:
    question = say(f"z = 7\nprint({S}, z)", before="Well. ")
    body = {"model": MODEL, "max_tokens": 200, "messages": [question], "tools": [EXECUTION]}
    message = Message.model_validate_json(json.dumps(runs.post("/v1/messages", body)), strict=True)
    kinds = [block.type for block in message.content]
    assert kinds == ["text", "server_tool_use", "code_execution_tool_result", "text"]
    result = message.content[2].model_dump()["content"]
    assert (result["stdout"], result["return_code"]) == ("SAY: 7\n", 0)
    assert message.stop_reason == "end_turn"
    assert message.container is not None
    content = [block.model_dump(exclude_none=True) for block in message.content]
    body["messages"] = [
        question,
        {"role": "assistant", "content": content},
        say(f"print({S}, z + 1)"),
    ]
    body |= {"container": message.container.id, "stream": True}
    read: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    events = [
        read.validate_json(e, strict=True)
        for e in runs.events("/v1/messages", body)
        if '"ping"' not in e
    ]
    texts = [e.delta.text for e in events if getattr(e, "delta", None) and hasattr(e.delta, "text")]
    assert "".join(texts).strip() == "8"
    assert events[-2].delta.container.id == message.container.id


def test_a_call_for_the_client_ends_the_answer(runs: Asked) -> None:
    weather = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    question = {"role": "user", "content": f"SAY:{program('a = 1')}\n{weather}"}
    choice = chat(runs, question, tools=[INTERPRETER, *TOOLS])
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert [c["function"]["name"] for c in message["tool_calls"]] == ["get_weather"]
    assert len(message["code_interpreter_calls"]) == 1
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "SAY:Sun"}
    assert chat(runs, question, message, result)["message"]["content"] == "Sun"


def test_a_program_costs_no_more_than_its_own_call(runs: Asked) -> None:
    """The model is told what happened, and the next program runs."""
    for code, told in (
        ("1 / 0", "ZeroDivisionError"),
        ("open('/etc/passwd')", "work folder alone"),
        ("import socket; socket.create_connection(('127.0.0.1', 1))", "no network"),
        ("import os; os.fork()", "no processes"),
        ("print('x' * 10 ** 6)", "[output: "),
        ("print('x' * 10 ** 4)", "characters left out"),
        ("import os; os._exit(0)", ""),
        ("open('big', 'wb').write(bytes(2 * 10 ** 8))", ""),
    ):
        chat(runs, say(f"try:\n  print('go')\nfinally:\n  pass\n{code}"), max_tokens=200)
        assert told in prompt_of(runs), code
        assert chat(runs, say(f"print({S}, 1)"))["message"]["content"].endswith("1")


def test_a_conversation_that_programs_have_filled_is_cut(runs: Asked) -> None:
    call = "open('seen', 'a').write('x'); print('y' * 7000)"
    again = program(call).replace("'", chr(39))
    loop = f"{call}; print({S} + {again!r})"
    choice = chat(runs, say(loop), max_tokens=19_000)
    assert choice["finish_reason"] in ("length", "stop")


def test_programs_that_sleep_or_flood_cost_their_own_call(runs: Asked) -> None:
    """And only that, also beside one that runs in another conversation."""

    async def run() -> None:
        limits = replace(LIMITS, wall=0.5, cpu=0.5, disk=2**20)
        with Sandbox(limits) as sandbox:
            python = Python(sandbox, most=3, limits=limits)
            first, second = (python.open(Interpreter()) for _ in range(2))
            await python.run("a", first, "x = 1")
            programs = {
                "import time; time.sleep(60)": "[timeout: ",
                "while True: pass": "[timeout: ",
                "while True: print('flood' * 1000)": "[",
                "open('f', 'wb').write(bytes(2 ** 22))": "",
            }
            for code, told in programs.items():
                bad, good = await asyncio.gather(
                    python.run("b", first, code), python.run("c", second, "6 * 7")
                )
                assert bad.failed
                assert told in bad.text
                assert good.text == "42"
            assert (await python.run("d", first, "2 + 2")).text.endswith("4")
            # Room for three conversations: the one that was not used for longest goes.
            third, fourth = (python.open(Interpreter()) for _ in range(2))
            assert third != fourth
            with pytest.raises(RequestError, match="no longer"):
                await python.run("e", second, "1")

    asyncio.run(run())


class Through:
    """The tool in the place of a sandbox, for the campaign of attacks."""

    def __init__(self) -> None:
        self._tool = Python(Sandbox(ATTACKED), limits=ATTACKED)

    def run(self, code: str) -> Any:
        async def ran() -> Any:
            container = self._tool.open(Interpreter())
            kept = "import io, sys\nsys.stdout = io.StringIO()\nimport ctypes\n"
            held = code.replace("import ctypes\n", kept, 1)
            held += "\nopen('rows', 'w').write(sys.stdout.getvalue())"
            result = await self._tool.run("a", container, held)
            return result, await self._tool.read(container, "rows")

        result, rows = asyncio.run(ran())
        return SimpleNamespace(
            stdout=rows.decode(), stderr=result.stderr, status="", detail=result.text
        )

    def close(self) -> None:
        self._tool.close()


def test_no_attack_succeeds_through_the_tool() -> None:
    """Those of tests/sandbox on files, network and processes; 14 is stat, which is documented."""
    through: Any = Through()
    try:
        found, broken = access(through)
    finally:
        through.close()
    assert broken == {}
    assert found.keys() <= {14}


def test_no_program_takes_more_than_its_own_call() -> None:
    """Those of tests/sandbox on memory, disk, output and time, nine at a time, beside a session
    that goes on answering and keeps its variables."""

    async def run(python: Python) -> None:
        beside = python.open(Interpreter())
        await python.run("a", beside, "kept = 41")
        free = asyncio.Semaphore(AT_ONCE)

        async def drop(number: int, code: str) -> tuple[int, Any]:
            async with free:
                return number, await python.run("b", python.open(Interpreter()), code)

        bombs = [asyncio.create_task(drop(n, code)) for n, (code, _) in BOMBS.items()]
        while not all(bomb.done() for bomb in bombs):
            assert (await python.run("c", beside, "kept + 1")).text == "42"
            await asyncio.sleep(0.2)
        for number, ran in [bomb.result() for bomb in bombs]:
            assert ran.failed, number
            assert len(ran.text) <= 2 * (MOST_TOLD + 500), number
            ends = {f"[{status}: " for status in BOMBS[number][1] - {"error"}}
            assert "error" in BOMBS[number][1] or any(end in ran.text for end in ends), ran.text
        assert (await python.run("d", beside, "kept + 1")).text == "42"

    with Sandbox(ATTACKED) as sandbox, holding(sandbox) as most:
        asyncio.run(run(Python(sandbox, most=2 * len(BOMBS), limits=ATTACKED)))
        assert most["files"] <= ATTACKED.files
        assert most["bytes"] <= (WRITTEN // 16 if most["watched"] else ATTACKED.disk)


def test_a_session_whose_process_has_ended_starts_anew(runs: Asked) -> None:
    question = say("import os; os._exit(0)")
    message = chat(runs, question)["message"]
    container = message["code_interpreter_calls"][0]["container_id"]
    chat(runs, say("1"), tools=[{**INTERPRETER, "container": container}])
    assert "started anew" in prompt_of(runs)


def test_files_in_and_out(runs: Asked) -> None:
    data = base64.b64encode(b"1 2 3").decode()
    code = f"open('out.txt', 'w').write('made')\nprint({S}, open('in.txt').read())"
    tool = {**INTERPRETER, "files": {"in.txt": data}}
    message = chat(runs, say(code), tools=[tool])["message"]
    assert message["content"].split("\n")[0].strip() == "1 2 3"
    (run,) = message["code_interpreter_calls"]
    (file,) = run["files"]
    assert (file["name"], file["bytes"]) == ("out.txt", 4)
    answer = runs.http.get(file["url"])
    assert answer.content == b"made"
    assert answer.headers["content-disposition"] == "attachment"
    listed = runs.http.get(f"/v1/containers/{run['container_id']}/files").json()["data"]
    assert {each["name"] for each in listed} == {"in.txt", "out.txt"}
    for path in ("out2.txt", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd"):
        url = f"/v1/containers/{run['container_id']}/files/{path}/content"
        assert runs.http.get(url).status_code in (400, 404)
    assert runs.http.get("/v1/containers/cntr_x/files").status_code == 400
    wrong = {**INTERPRETER, "files": {"x": "no base64!"}}
    runs.refused(CHAT, {"messages": [say("1")], "tools": [wrong]}, "tools[0].files.x")


def test_no_more_programs_than_allowed(runs: Asked) -> None:
    again = program("1").replace("SAY", "")
    loop = f"print({S} + {again!r})"
    body = {
        "model": MODEL,
        "input": [say(loop)],
        "tools": [INTERPRETER],
        "max_tool_calls": 2,
        "max_output_tokens": 400,
    }
    response = runs.post("/v1/responses", body)
    kinds = [item["type"] for item in response["output"]]
    assert kinds.count("code_interpreter_call") == 2


def test_it_is_there_only_where_it_is_asked_for(runs: Asked, server: Asked) -> None:
    runs.post(CHAT, {"messages": [{"role": "user", "content": "SAY:x"}]})
    assert "sandbox" not in prompt_of(runs)
    server.refused(CHAT, {"messages": [say("1")], "tools": [INTERPRETER]}, "tools[0].type")
    body = {"model": MODEL, "input": "SAY:x", "tools": [INTERPRETER]}
    assert "code_interpreter" in server.post("/v1/responses", body)["notes"][0]
    body = {"model": MODEL, "max_tokens": 9, "messages": [say("1")], "tools": [EXECUTION]}
    assert "--tools python" in server.refused_message(body)
    assert server.http.get("/v1/containers/x/files").status_code == 404
    clash = {"type": "function", "function": {**WEATHER, "name": "python"}}
    runs.refused(CHAT, {"messages": [say("1")], "tools": [clash, INTERPRETER]}, "tools[1].type")
    runs.refused(CHAT, {"messages": [say("1")], "tools": [INTERPRETER], "n": 2}, "n")


def test_unknown_containers_are_refused(runs: Asked) -> None:
    body = {"messages": [say("1")], "tools": [{**INTERPRETER, "container": "cntr_other"}]}
    runs.refused(CHAT, body, "container")


def test_a_client_that_goes_away_ends_its_program(runs: Asked) -> None:
    body = {
        "messages": [say("while True: pass")],
        "tools": [INTERPRETER],
        "stream": True,
    }
    before = threading.active_count()
    with runs.http.stream("POST", CHAT, json=body) as answer:
        for line in answer.iter_lines():
            if "interpreting" in line:
                break
    wait_until(lambda: threading.active_count() <= before + 1)
    assert chat(runs, say(f"print({S}, 2)"))["message"]["content"].endswith("2")


def test_it_fails_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a sandbox that holds, nothing is served, and no model is loaded."""

    def refuse(self: Sandbox, code: str) -> None:
        raise SandboxUnavailable("nothing holds it here")

    monkeypatch.setattr(Sandbox, "run", refuse)
    with pytest.raises(SandboxUnavailable):
        Server.open("no-such-model", port=0, tools=("python",))
    with pytest.raises(UsageError, match="--tools"):
        Options(tools=("shell",))
