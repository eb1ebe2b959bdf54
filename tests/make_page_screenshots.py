"""README's pictures of the chat page: a real conversation with gpt-oss-tiny.

python tests/make_page_screenshots.py      # writes gptoss_jax/server/page/screenshots/*.png
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

FOLDER = Path(__file__).parent.parent / "gptoss_jax" / "server" / "page" / "screenshots"
DESKTOP = {"viewport": {"width": 1120, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 800}, "is_mobile": True, "has_touch": True}


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    last = page.get_by_role("article", name="Answer").last
    expect(last).to_have_attribute("aria-busy", "false", timeout=60_000)
    page.wait_for_timeout(300)


def settings(page: Page, change: Callable[[], None]) -> None:
    page.get_by_role("button", name="Settings").click()
    change()
    page.get_by_role("button", name="Save").click()


def take(browser: Browser, address: str, path: Path, **context) -> None:
    page = browser.new_context(**context).new_page()
    page.goto(address)
    page.get_by_label("High").check()
    settings(page, lambda: page.get_by_label("Temperature").fill("0"))
    for text in (
        "Who are you?",
        "Tom has 12 apples and buys 30 more. How many apples does he have?",
    ):
        ask(page, text)
        page.evaluate("document.getElementById('new').click()")
    if path.stem == "light":
        ask(page, "What is 347 + 285?")
        page.locator("summary").click()
        expect(page.locator(".answer")).to_have_text("347 + 285 = 632")
    else:
        settings(page, lambda: page.get_by_role("button", name="Insert an example").click())
        ask(page, "What is 347 * 285?")
        page.get_by_label("Result of calculator").fill("98895")
    if path.stem == "dark":
        page.get_by_role("button", name="Send result").click()
        answer = page.get_by_role("article", name="Answer").nth(1).locator(".answer")
        expect(answer).to_have_text("347 * 285 = 98895")
    page.wait_for_timeout(500)
    page.screenshot(path=path)
    page.context.close()


def make(browser: Browser, folder: Path) -> None:
    """Serves gpt-oss-tiny, talks to it through the page, and writes the pictures."""
    command = [sys.executable, "-m", "gptoss_jax.cli.main", "serve", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = (re.search(r"http://\S+", line) for line in server.stdout)
        address = next(match[0] for match in found if match)
        take(browser, address, folder / "light.png", color_scheme="light", **DESKTOP)
        take(browser, address, folder / "dark.png", color_scheme="dark", **DESKTOP)
        take(browser, address, folder / "phone.png", color_scheme="light", **PHONE)
    finally:
        server.terminate()
        server.communicate(timeout=60)


if __name__ == "__main__":
    with sync_playwright() as started:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        make(started.chromium.launch(executable_path=chromium, args=["--no-sandbox"]), FOLDER)
