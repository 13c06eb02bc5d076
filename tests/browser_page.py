"""Use the chat page in headless Chromium: send, stream, stop, begin anew. Not part of the tests.

pip install playwright        # and a Chromium, such as Debian's
tmac-serve --port 8080 &
python tests/browser_page.py http://127.0.0.1:8080/ /usr/bin/chromium page.png
"""

from __future__ import annotations

import sys

from playwright.sync_api import sync_playwright

WAIT = {"timeout": 90_000}


def main(url: str, chromium: str, picture: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        # The page forbids eval, through which playwright waits.
        page = browser.new_page(bypass_csp=True, viewport={"width": 900, "height": 700})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(url) or faults.append(asked.url))
        page.goto(url)
        page.wait_for_function("document.title !== 'tmac'", **WAIT)
        page.click("summary")
        page.fill("#system", "You are brief.")
        page.fill("#temperature", "0")
        page.fill("#max", "40")
        page.fill("#text", "Name three colours.")
        page.press("#text", "Enter")
        page.wait_for_selector(".note", **WAIT)
        page.screenshot(path=picture)
        assert page.inner_text(".assistant")
        whole = (
            "[...document.querySelectorAll('.turn')].every(t => t.scrollHeight <= t.clientHeight)"
        )
        assert page.evaluate(whole), "a turn is cut off"
        page.set_viewport_size({"width": 360, "height": 640})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.set_viewport_size({"width": 900, "height": 700})
        page.fill("#max", "2000")
        page.fill("#text", "Write a very long story about rain.")
        page.press("#text", "Enter")
        long = "(document.querySelectorAll('.assistant')[1]?.textContent ?? '').length > 80"
        page.wait_for_function(long, **WAIT)
        page.click("#send")
        page.wait_for_function("document.getElementById('send').textContent === 'Send'", **WAIT)
        assert page.locator(".note").last.inner_text() == "stopped"
        page.fill("#text", "Write another one.")
        page.press("#text", "Enter")
        page.wait_for_function(long.replace("[1]", "[2]"), **WAIT)
        page.click("#clear")
        page.wait_for_function("document.getElementById('send').textContent === 'Send'", **WAIT)
        assert page.locator("#log > *").count() == 0
        browser.close()
    assert not faults, faults


if __name__ == "__main__":
    main(*sys.argv[1:])
