"""The page at /, in a headless Chromium: load, send, stream, stop, error, reload.

It needs playwright and a chromium, such as Debian's; OPTIQ_CHROMIUM names another one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.servers import Asked, doubled, scripted, tiny_tokenizer, wait_until

CHROMIUM = os.environ.get("OPTIQ_CHROMIUM") or shutil.which("chromium") or shutil.which("chrome")
THOUGHT = "SAY:<think>\nLet me see\n</think>\n\n"


def test_one_file_and_no_network(server: Asked) -> None:
    answer = server.http.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", answer.text)
    assert "innerHTML" not in answer.text
    for word in ("@import", "url(", "eval(", "document.write"):
        assert word not in answer.text


def test_the_page_needs_no_key_and_its_data_does(keyed: Asked) -> None:
    assert keyed.http.get("/").status_code == 200
    assert keyed.http.get("/status").status_code == 401


def test_status(server: Asked) -> None:
    server.post("/v1/chat/completions", {"messages": 5}, 400)
    server.chat("SAY:Hi")
    status = server.http.get("/status").json()
    (model,) = status["models"]
    assert model["name"] == "tiny"
    assert model["generated_tokens"] > 0
    assert status["errors"][0]["code"] == "invalid_value"
    assert status["tools"] == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def paged() -> Iterator[Asked]:
    tokenizer = tiny_tokenizer(thinking=True)
    with scripted(tokenizer, 8192, tools=("python",), sandbox_packages=()) as asked:
        yield asked


@pytest.fixture
def page(browser: Any, paged: Asked) -> Iterator[Any]:
    """The page, which may have said nothing to the console and asked nobody else."""
    context = browser.new_context(viewport={"width": 390, "height": 700}, color_scheme="dark")
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    opened.on("request", lambda r: None if r.url.startswith((paged.server.url, "data:", "blob:")) else wrong.append(r.url))  # fmt: skip  # noqa: E501
    opened.set_default_timeout(60_000)
    opened.goto(paged.server.url)
    yield opened
    context.close()
    assert [text for text in wrong if "Failed to load resource" not in text] == []


def until(page: Any, script: str) -> None:
    """Until it is true; playwright's own way needs `eval`, which the page does not allow."""
    wait_until(lambda: page.evaluate(script))


def say(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def test_it_streams_folds_reasoning_and_shows_code(page: Any) -> None:
    assert page.evaluate("document.activeElement.id") == "input"
    code = "```python\nprint('<b>hi</b>')\n```"
    say(page, f"{THOUGHT}Some **bold** words\n\n{code}\n\nand `more`")
    page.wait_for_selector("article.assistant .took")
    article = page.locator("article.assistant")
    assert article.locator("pre code").inner_text() == "print('<b>hi</b>')"
    assert article.locator("b").inner_text() == "bold"
    assert article.locator("p code").inner_text() == "more"
    assert not article.locator(".thought").is_visible()
    article.locator("summary").first.click()
    assert article.locator(".thought").inner_text() == "Let me see"
    assert "from the cache" in article.locator(".took").inner_text()
    # A phone's width, nothing to scroll sideways; and dark.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 26)"
    # The next turn goes on, and what stands there is still there after a reload.
    say(page, "SAY:Second")
    until(page, "document.querySelectorAll('article .took').length === 2")
    page.reload()
    assert page.locator("article.assistant").nth(1).inner_text().startswith("Second")
    page.click("#new")
    assert page.locator("article").count() == 0


def test_stop(page: Any, paged: Asked) -> None:
    say(page, "SAY(delay=0.1):" + "slow " * 300)
    until(page, "document.querySelector('article.assistant')?.innerText.includes('slow') ?? false")
    page.click("#stop")
    page.wait_for_selector("article.assistant .took")
    assert page.locator(".took").inner_text() == "stopped"
    say(page, "SAY(delay=0.1):" + "again " * 300)
    until(page, "document.querySelectorAll('article.assistant p').length > 1")
    page.keyboard.press("Escape")
    until(page, "document.querySelectorAll('.took').length === 2")
    say(page, "SAY:fine")
    until(page, "document.querySelectorAll('.took').length === 3")
    assert paged.engine.stats().running == 0


def test_an_error_is_shown_and_the_next_question_works(page: Any) -> None:
    say(page, "SAY(fails=broken):x")
    assert page.wait_for_selector("article [role=alert]").inner_text()
    say(page, "SAY:fine")
    page.wait_for_selector(".took")


def test_settings_status_and_python(page: Any, paged: Asked) -> None:
    page.click("#open-settings")
    page.fill("#temperature", "0.3")
    page.fill("#system", "Be brief")
    page.check("#python")
    call = (
        '<tool_call>\n{"name": "python", "arguments": {"code": "print(chr(83)+\'AY:\', 6*7);'
        " open('a.txt','w').write('x')\"}}\n</tool_call>"
    )
    say(page, f"SAY:{call}")
    page.wait_for_selector(".took")
    assert page.locator("details.program summary").inner_text() == "Python completed"
    assert page.get_by_role("button", name="a.txt (1 bytes)").count() == 1
    request = paged.engine.requests[-1]
    assert request.sampling.temperature == 0.3
    assert "system\nBe brief" in paged.tokenizer.decode(list(request.tokens))
    page.click("#open-status")
    page.wait_for_selector("#status td")
    assert "From the cache" in page.locator("#status").inner_text()
    page.reload()
    assert page.input_value("#temperature") == "0.3"


def test_a_server_with_a_key(browser: Any) -> None:
    with doubled(api_keys=("a-good-key",)) as asked:
        opened = browser.new_page()
        opened.set_default_timeout(60_000)
        opened.goto(asked.server.url)
        opened.wait_for_selector("[role=alert]")
        assert opened.evaluate("document.activeElement.id") == "key"
        opened.fill("#key", "a-good-key")
        opened.press("#key", "Tab")
        opened.wait_for_selector("#model option", state="attached")
        say(opened, "SAY:fine")
        opened.wait_for_selector(".took")
        opened.close()
