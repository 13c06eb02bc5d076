"""The chat page as a person uses it, in headless Chromium (CONTRIBUTING.md: what that needs)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import running, stalled, wait_for
from tmac_py.model import Model

NEEDED = "needs playwright and a Chromium (CONTRIBUTING.md)"
sync_api = pytest.importorskip("playwright.sync_api", reason=NEEDED)
expect = sync_api.expect

DESKTOP = {"width": 1000, "height": 700}
PHONE = {"width": 360, "height": 640}
WAIT = 60_000
"""Milliseconds."""
expect.set_options(timeout=WAIT)

CONTRAST = """() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const probe = document.body.appendChild(document.createElement("div"));
  probe.style.background = "Canvas";
  const canvas = getComputedStyle(probe).backgroundColor;
  probe.remove();
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return canvas;
  };
  const shown = [...document.querySelectorAll(
    "h1, button, summary, label, input, textarea, #log *")];
  return [luminance(canvas), shown.map((node) => {
    const two = [getComputedStyle(node).color, behind(node)].map(luminance).sort((a, b) => b - a);
    return [node.outerHTML.slice(0, 60), (two[0] + 0.05) / (two[1] + 0.05)];
  })];
}"""
"""The luminance of the background, and the contrast of each text by WCAG 2.1, 1.4.3."""


class ChatPage:
    """The page in a window of its own, and what it asked the server for."""

    def __init__(self, browser: Any, port: int, window: dict[str, Any]) -> None:
        self.page = browser.new_page(**{"viewport": DESKTOP, **window})
        self.page.set_default_timeout(WAIT)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.faults: list[str] = []
        self._url = f"http://127.0.0.1:{port}/"
        self.page.on("request", self._note_request)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._note_console)
        self.page.goto(self._url)
        self.log = self.page.locator("#log")
        self.button = self.page.locator("#send")

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith(self._url):
            self.faults.append(request.url)
        if request.method == "POST":
            self.bodies.append(json.loads(request.post_data))
            self.keys.append(request.headers.get("authorization"))

    def _note_console(self, message: Any) -> None:
        # Chromium logs answers of 4xx too.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.faults.append(message.text)

    def set(self, **settings: object) -> None:
        self.page.locator("details").evaluate("node => { node.open = true; }")
        for name, value in settings.items():
            self.page.fill(f"#{name}", str(value))

    def say(self, text: str) -> None:
        """Says something and waits until it has been sent."""
        self.page.fill("#text", text)
        with self.page.expect_request("**/v1/chat/completions"):
            self.page.press("#text", "Enter")

    def ask(self, text: str) -> None:
        """Says something and waits until the answer has ended."""
        self.say(text)
        expect(self.button).to_have_text("Send")

    def turns(self, kind: str) -> list[str]:
        return [text.strip() for text in self.log.locator(f".{kind}").all_text_contents()]


OpenPage = Callable[..., ChatPage]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    installed = next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as playwright:
        path = installed or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip(NEEDED)
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[OpenPage]:
    """Opens the page of the server at a port; at the end nothing may have gone wrong in it."""
    pages: list[ChatPage] = []

    def open_one(port: int, **window: Any) -> ChatPage:
        pages.append(ChatPage(browser, port, window))
        return pages[-1]

    yield open_one
    for opened in pages:
        opened.page.close()
        assert opened.faults == []


def test_a_chat(open_page: OpenPage, port: int, model: Model) -> None:
    chat = open_page(port)
    expect(chat.page).to_have_title("tiny")
    chat.set(temperature=0, max=12, system="the mat")
    chat.ask("the cat")
    messages = [{"role": "system", "content": "the mat"}, {"role": "user", "content": "the cat"}]
    expected = str(model.generate(model.chat_prompt(messages), max_tokens=12, temperature=0))
    assert chat.turns("assistant") == [expected.strip()]
    assert expected.strip()
    assert re.fullmatch(
        r"\d+ prompt tokens \(0 cached\) · 12 tokens at \d+/s · ended by the limit",
        chat.turns("note")[0],
    )
    chat.ask("Hello world")
    assert chat.turns("user") == ["the cat", "Hello world"]
    roles = [message["role"] for message in chat.bodies[1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert chat.bodies[1]["messages"][2]["content"].strip() == expected.strip()
    cached = re.search(r"\((\d+) cached\)", chat.turns("note")[1])
    assert cached is not None
    assert int(cached[1]) > 0

    chat.page.click("#clear")
    expect(chat.log).to_be_empty()
    chat.ask("the cat")
    assert chat.bodies[2]["messages"] == messages
    assert chat.turns("assistant") == [expected.strip()]


def test_lines_and_keys(open_page: OpenPage, port: int) -> None:
    chat = open_page(port)
    chat.set(max=12, temperature=0)
    chat.page.fill("#text", " ")
    chat.page.press("#text", "Enter")
    chat.page.fill("#text", "the cat")
    chat.page.press("#text", "Shift+Enter")
    chat.page.type("#text", "sat")
    chat.ask(chat.page.input_value("#text"))
    assert [body["messages"][0]["content"] for body in chat.bodies] == ["the cat\nsat"]
    assert chat.page.input_value("#text") == ""
    expect(chat.page.locator("#text")).to_be_focused()


def test_text_comes_as_it_is_made_and_stops(open_page: OpenPage, model: Model) -> None:
    with stalled(model, timeout=120) as (engine, port):
        chat = open_page(port)
        chat.set(temperature=0)
        chat.say("the cat")
        expect(chat.button).to_have_text("Stop")
        wait_for(lambda: engine.n_waiting == 1)

        def one_more() -> bool:
            engine.step()
            return chat.turns("assistant") != [""]

        wait_for(one_more)
        made = engine.counters.decode_tokens
        shown = chat.turns("assistant")[0]
        chat.page.press("#text", "Enter")  # not while an answer is under way
        chat.button.click()
        expect(chat.button).to_have_text("Send")
        assert chat.turns("note") == ["stopped"]
        assert chat.turns("assistant")[0].startswith(shown)
        wait_for(lambda: engine.step() or engine.n_active == 0)
        assert engine.counters.decode_tokens < made + 200
        assert len(chat.bodies) == 1

        chat.say("Hello")  # what was said before it stopped counts
        wait_for(lambda: engine.n_waiting == 1)
        roles = [message["role"] for message in chat.bodies[1]["messages"]]
        assert roles == ["user", "assistant", "user"]
        chat.page.click("#clear")  # ends the answer
        wait_for(lambda: engine.step() or engine.n_active == engine.n_waiting == 0)
        expect(chat.button).to_have_text("Send")
        expect(chat.log).to_be_empty()


def test_a_request_that_is_refused_can_be_sent_again(open_page: OpenPage, port: int) -> None:
    chat = open_page(port)
    chat.set(temperature=-1, max=12)
    chat.ask("the cat")
    (text,) = chat.turns("error")
    assert text.startswith("temperature")
    assert chat.turns("assistant") == chat.turns("user") == []
    assert chat.page.input_value("#text") == "the cat"
    chat.set(temperature=0)
    chat.ask("the cat")
    assert len(chat.turns("assistant")) == 1
    assert chat.turns("error") == []
    assert len(chat.bodies[1]["messages"]) == 1


def test_a_server_that_is_gone(open_page: OpenPage, lut: Path) -> None:
    with running(lut) as (_, port):
        chat = open_page(port)
        expect(chat.page).to_have_title("tiny")
    chat.ask("the cat")
    assert not {"temperature", "max_tokens"} & set(chat.bodies[0])  # the model's own
    assert chat.turns("error") == ["No connection to the server."]


def test_a_key(open_page: OpenPage, lut: Path) -> None:
    with running(lut, "--alias", "keyed", "--api-key", "secret") as (_, port):
        chat = open_page(port)
        expect(chat.page.locator("#key")).to_be_visible()  # settings open by themselves
        chat.ask("the cat")
        assert chat.turns("error") == ["the API key is missing or wrong"]
        chat.set(key="secret", temperature=0, max=12)
        chat.page.press("#key", "Tab")
        expect(chat.page).to_have_title("keyed")
        chat.ask("the cat")
        assert chat.keys == [None, "Bearer secret"]
        assert len(chat.turns("note")) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(open_page: OpenPage, port: int, scheme: str) -> None:
    chat = open_page(port, viewport=PHONE, color_scheme=scheme)
    chat.set(max=60, temperature=0)
    chat.ask("W" * 200)
    chat.ask("```python\n" + "x" * 200 + "\n```\nthe cat")
    chat.set(temperature=-1)
    chat.ask("the cat")
    page = chat.page
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate("document.documentElement.scrollHeight") <= PHONE["height"]
    whole = "[...document.querySelectorAll('.turn')].every(t => t.scrollHeight <= t.clientHeight)"
    assert page.evaluate(whole), "a turn is cut off"
    expect(chat.button).to_be_in_viewport(ratio=1)
    expect(page.locator("#clear")).to_be_in_viewport(ratio=1)
    background, texts = page.evaluate(CONTRAST)
    assert (background < 0.1) == (scheme == "dark")
    assert [text for text in texts if text[1] < 4.5] == []
