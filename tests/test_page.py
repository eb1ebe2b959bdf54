"""The chat page in a headless Chromium, in front of the real server with a scripted engine.

Every page of every test also holds: no request leaves the server's origin, nothing is reported in
the console, and no script fails.
"""

import contextlib
import dataclasses
import html.parser
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedEngine, harmony_ids
from serving import served, until

from gptoss_jax.server import page as files
from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings

try:
    from playwright import sync_api as playwright
except ImportError:
    playwright = None

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
REASONING = "Both numbers are small."
ANSWER = "The sum is **632**, as `347 + 285` shows."


def reply(final: str, analysis: str = "") -> str:
    """A completion with (perhaps) reasoning, and an answer."""
    thought = f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant"
    return f"{thought if analysis else ''}<|channel|>final<|message|>{final}<|return|>"


def call(arguments: str, preamble: str = "", name: str = "calculator") -> str:
    """A completion that calls a function."""
    said = f"<|channel|>commentary<|message|>{preamble}<|end|><|start|>assistant"
    header = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
    return f"{said if preamble else ''}{header}{arguments}<|call|>"


@contextlib.contextmanager
def serve(engine, **settings):
    """The server's address, while it runs in a thread."""
    app = create_app(engine, ServerSettings(**settings))
    with served(app, ws="none", timeout_graceful_shutdown=1) as address:
        yield address
    engine.close(0)


@pytest.fixture(scope="module")
def browser():
    if playwright is None:
        pytest.skip("no playwright: pip install playwright")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    playwright.expect.set_options(timeout=20_000)  # a busy machine; the first grammar
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@dataclasses.dataclass
class Visit:
    """One browser tab on the page, and what it did."""

    page: Any
    engine: ScriptedEngine
    allowed: list[str]  # console messages that the test provokes

    def say(self, text: str) -> None:
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def answered(self, number: int = 1) -> Any:
        """The number-th answer, once it is complete."""
        articles = self.page.get_by_role("article", name="Answer")
        playwright.expect(articles).to_have_count(number)
        playwright.expect(articles.nth(number - 1)).to_have_attribute("aria-busy", "false")
        return articles.nth(number - 1)

    def ask(self, text: str, number: int = 1) -> Any:
        self.say(text)
        return self.answered(number)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def prompt(self) -> str:
        """What the model was given last."""
        return self.engine.tokenizer.decode(self.engine.requests[-1].prompt)

    def manage(self, action: str, title: str) -> None:
        """Uses the button that shows when one points at a conversation."""
        item = self.page.get_by_role("listitem").filter(has_text=title)
        item.hover()
        item.get_by_role("button", name=action).click()

    def settings(self, **fields: str) -> None:
        self.button("Settings").click()
        for name, value in fields.items():
            self.page.locator(f"#settings [name={name}]").fill(value)
        self.button("Save").click()


@pytest.fixture
def visit(browser):
    """visit(engine, server's settings) -> Visit; any argument of new_context by name."""
    with contextlib.ExitStack() as stack:

        def start(engine, settings=None, url=None, **context):
            address = url or stack.enter_context(serve(engine, **(settings or {})))
            opened = browser.new_context(**context)
            stack.callback(opened.close)
            page, seen, wrong = opened.new_page(), [], []
            page.set_default_timeout(20_000)
            visited = Visit(page, engine, [])
            opened.on("request", lambda request: seen.append(request.url))
            # what the policy stopped was never sent
            opened.on("requestfailed", lambda r: seen.remove(r.url) if r.failure == "csp" else None)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
            page.on(
                "console",
                lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None,
            )

            @stack.callback
            def holds():
                outside = [u for u in seen if not u.startswith((address, f"blob:{address}"))]
                assert outside == []
                left = [w for w in wrong if not any(a in w for a in visited.allowed)]
                assert left == []
                assert seen

            page.goto(address)
            playwright.expect(page.get_by_label("Model")).to_have_value(engine.name)
            return visited

        yield start


def test_an_answer_streams_and_is_counted(visit):
    tokens = harmony_ids(reply(ANSWER * 8, REASONING))
    v = visit(ScriptedEngine(tokens, delay=0.01, hold_after=len(tokens) // 3))
    v.page.evaluate(
        """() => {
            window.lengths = [];
            new MutationObserver(() => {
                const answer = document.querySelector(".answer");
                if (answer) lengths.push(answer.textContent.length);
            }).observe(document.getElementById("messages"), {subtree: true, childList: true, characterData: true});
        }"""
    )
    v.say("What is 347 + 285?")
    until(lambda: v.page.evaluate("lengths.length"))  # the rest does not come in one piece
    v.engine.go_on()
    answer = v.answered()
    lengths = v.page.evaluate("lengths")
    assert len(set(lengths)) > 10
    assert answer.locator(".answer").inner_text() == "The sum is 632, as 347 + 285 shows." * 8
    assert answer.locator(".answer strong").count() == 8
    numbers = answer.locator("footer").inner_text()
    prompt = len(v.engine.requests[0].prompt)
    assert f"{len(tokens)} tokens" in numbers
    assert f"prompt {prompt}" in numbers
    rate = float(re.search(r"([\d,.]+) tokens/s", numbers)[1].replace(",", ""))
    assert 1 < rate < 2 / 0.01  # the engine's steps, seen from a busy browser


def test_reasoning_is_folded(visit):
    v = visit(ScriptedEngine(reply("632", REASONING * 10), delay=0.01, hold_after=20))
    v.say("What is 347 + 285?")
    live = v.page.get_by_text(re.compile(r"^Thinking for \d+\.\d+ s$"))
    playwright.expect(live).to_be_visible()
    v.engine.go_on()
    thought = v.page.get_by_text(REASONING)
    playwright.expect(thought).to_be_hidden()
    answer = v.answered()
    summary = answer.locator("summary")
    tokens = len(harmony_ids("<|message|>" + REASONING * 10 + "<|end|>"))
    said = re.fullmatch(r"Thought for (\d+\.\d) s, (\d+) tokens", summary.inner_text())
    assert abs(int(said[2]) - tokens) <= 2
    assert 0.005 * tokens <= float(said[1]) < tokens
    playwright.expect(thought).to_be_hidden()
    summary.click()
    playwright.expect(thought).to_be_visible()
    assert thought.inner_text() == REASONING * 10


def test_effort_and_settings_reach_the_model_and_stay(visit):
    v = visit(ScriptedEngine(reply("ok"), repeat=True, adapters=["pirate"]))
    v.ask("one")
    assert "Reasoning: medium" in v.prompt()
    v.page.get_by_label("High").check()
    v.page.get_by_label("Model").select_option("pirate")
    v.settings(instructions="Be brief.", temperature="0.5", top_p="0.25", max_tokens="9", seed="7")
    v.page.reload()
    playwright.expect(v.page.get_by_label("High")).to_be_checked()
    playwright.expect(v.page.get_by_label("Model")).to_have_value("pirate")
    v.ask("two", 2)
    assert "Reasoning: high" in v.prompt()
    assert "Be brief." in v.prompt()
    request = v.engine.requests[-1]
    assert request.adapter == "pirate"
    assert (request.sampling.temperature, request.sampling.top_p) == (0.5, 0.25)
    assert (request.sampling.seed, request.max_new_tokens) == (7, 9)


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_ends_it_on_the_server_too(visit, how):
    v = visit(ScriptedEngine(reply("word " * 2000), reply("next"), delay=0.01))
    v.say("Go on and on")
    playwright.expect(v.page.locator(".answer")).to_contain_text("word word")
    if how == "button":
        v.button("Stop").click()
    else:
        v.page.keyboard.press("Escape")
    answer = v.answered()
    until(lambda: v.engine.cancelled == [(0, 0)], 5)
    playwright.expect(answer.get_by_text("Stopped.")).to_be_visible()
    assert answer.locator(".answer").inner_text().startswith("word word")
    v.ask("Again", 2)
    assert "word word" in v.prompt()  # what came is part of the conversation


def test_a_tool_call_is_shown_and_answered(visit):
    arguments = '{"expression": "347 * 285"}'
    v = visit(ScriptedEngine(call(arguments, "I will calculate."), reply("It is 98895.")))
    v.button("Settings").click()
    v.button("Insert an example").click()
    v.button("Save").click()
    first = v.ask("What is 347 * 285?")
    assert "type calculator = (_: {" in v.prompt()
    playwright.expect(first.locator(".answer")).to_have_text("I will calculate.")
    card = first.get_by_role("region", name="Call of calculator")
    assert json.loads(card.locator("pre").inner_text()) == json.loads(arguments)
    assert "\n" in card.locator("pre").inner_text()
    v.say("never mind")
    assert len(v.engine.requests) == 1  # a call waits: it comes first
    v.page.reload()
    v.page.get_by_label("Result of calculator").fill("98895")
    v.button("Send result").click()
    answer = v.answered(2)
    assert answer.locator(".answer").inner_text() == "It is 98895."
    assert "functions.calculator to=assistant<|channel|>commentary<|message|>98895" in v.prompt()
    assert arguments in v.prompt()
    playwright.expect(card.get_by_text("98895")).to_be_visible()


def test_a_tool_must_be_described_rightly(visit):
    v = visit(ScriptedEngine())
    for text, fault in [("{", "Tools: "), ('[{"name": "no spaces"}]', "needs a name")]:
        v.settings(tools=text)
        playwright.expect(v.page.locator("#settings .fault")).to_contain_text(fault)
        playwright.expect(v.page.get_by_label("Tools")).to_be_focused()
        v.button("Cancel").click()


NASTY = [
    "<script>window.pwned = 1</script>",
    '<img src="/x" onerror="window.pwned = 2">',
    "<svg onload='window.pwned = 3'></svg><iframe src='javascript:parent.pwned = 4'></iframe>",
    "[a](javascript:window.pwned=5) [b](JaVaScRiPt:window.pwned=6) [c](data:text/html,x)",
    "[d]( javascript:alert(1)) [e](\x01javascript:alert(1)) [f](//evil.example/x) [g](/v1/models)",
    "![h](https://evil.example/track.png) [i](https://good.example/'\"><b>)",
    "<a href='javascript:window.pwned=7'>j</a> &lt;b&gt; <b>bold</b> <style>*{display:none}</style>",
    "```html\n<script>window.pwned = 8</script>\n```",
    "`<img src=/x onerror=window.pwned=9>` | <td> |",
    '[k](https://good.example/" onclick="window.pwned=10)',
    "[l](vbscript:x) [m](file:///etc/passwd) <javascript:alert(1)>",
    "# <img src=/x onerror=window.pwned=11>\n| <script>a</script> | b |\n| --- | --- |\n| <img src=/x> | c |",
]
PLACES = """() => [...document.querySelectorAll("#messages *, #conversations *")].filter((e) =>
    ["SCRIPT", "IMG", "IFRAME", "STYLE", "OBJECT", "EMBED", "B", "TD-X"].includes(e.tagName)
    || [...e.attributes].some((a) => a.name.startsWith("on") || a.name === "src" || a.name === "style")
).map((e) => e.outerHTML)"""


def test_html_in_answers_is_inert(visit):
    nasty = "\n\n".join(NASTY)
    arguments = json.dumps({"expression": nasty})
    v = visit(ScriptedEngine(reply(nasty, nasty), call(arguments, nasty), reply("ok")))
    v.settings(tools='[{"name": "calculator"}]')
    v.ask("<img src=/x onerror=window.pwned=12>")
    v.page.locator("summary").first.click()
    v.ask("again", 2)
    v.page.get_by_label("Result of calculator").fill("<script>window.pwned = 13</script>")
    v.button("Send result").click()
    v.answered(3)
    for _ in range(2):
        assert v.page.evaluate(PLACES) == []
        links = v.page.evaluate("[...document.querySelectorAll('#messages a')].map((a) => a.href)")
        assert links
        assert all(link.startswith("https://") for link in links)
        assert v.page.evaluate("window.pwned") is None
        shown = v.page.locator(".answer").first.inner_text()
        assert '<img src="/x" onerror="window.pwned = 2">' in shown  # it is there, as text
        assert "[a](javascript:window.pwned=5)" in shown
        v.page.reload()
        v.answered(3)


def test_the_policy_holds_even_if_a_script_forgets(visit):
    v = visit(ScriptedEngine())
    v.allowed += ["Content Security Policy", "TrustedHTML", "Content-Security-Policy", "violates"]
    refused = """() => {
        try { document.body.innerHTML = "<img src=https://evil.example/x>"; return "set"; }
        catch (error) { return error.name; }
    }"""
    assert v.page.evaluate(refused) == "TypeError"
    leak = "fetch('https://evil.example/').then(() => 'sent', (error) => error.name)"
    assert v.page.evaluate(leak) == "TypeError"
    image = """() => new Promise((resolve) => {
        const image = document.createElement("img");
        image.onload = () => resolve("loaded");
        image.onerror = () => resolve("refused");
        image.src = "https://evil.example/x.png";
    })"""
    assert v.page.evaluate(image) == "refused"


def test_conversations_stay_in_the_browser(visit, tmp_path):
    v = visit(ScriptedEngine(reply("first answer", REASONING), reply("second answer")))
    v.ask("First question?")
    v.button("New chat").click()
    playwright.expect(v.page.get_by_role("article")).to_have_count(0)
    v.ask("Second question?")
    assert "First question?" not in v.prompt()
    v.page.reload()
    playwright.expect(v.page.locator(".answer")).to_have_text("second answer")
    v.button("First question?").click()
    playwright.expect(v.page.locator(".answer")).to_have_text("first answer")
    v.page.go_back()
    playwright.expect(v.page.locator(".answer")).to_have_text("second answer")

    v.manage("Rename", "First question?")
    v.page.get_by_label("Title").fill("<b>Sums</b>")
    v.button("Rename").click()
    with v.page.expect_download() as download:
        v.manage("Export", "<b>Sums</b>")
    exported = json.loads(Path(download.value.path()).read_text())
    assert download.value.suggested_filename == "b-Sums-b.json"
    said = [(m["role"], m["content"], m.get("reasoning")) for m in exported["messages"]]
    assert said == [("user", "First question?", None), ("assistant", "first answer", REASONING)]

    v.manage("Delete", "<b>Sums</b>")
    v.button("Cancel").click()
    playwright.expect(v.button("<b>Sums</b>")).to_be_visible()
    v.manage("Delete", "<b>Sums</b>")
    v.button("Delete").click()
    playwright.expect(v.button("<b>Sums</b>")).to_have_count(0)
    assert "first answer" not in v.page.evaluate("JSON.stringify(localStorage)")
    playwright.expect(v.page.locator(".answer")).to_have_text("second answer")


def test_edit_and_again_replace_the_last_turn(visit):
    v = visit(ScriptedEngine(reply("one"), reply("two"), reply("three")))
    v.ask("Old question")
    v.button("Make this answer again").click()
    playwright.expect(v.page.locator(".answer")).to_have_text("two")
    assert "one" not in v.page.locator("#messages").inner_text()
    v.button("Edit and send again").click()
    v.page.get_by_label("Your message").fill("New question")
    v.page.get_by_label("Your message").press("Enter")
    playwright.expect(v.page.locator(".answer")).to_have_text("three")
    assert "New question" in v.prompt()
    assert "Old question" not in v.prompt()
    assert "<|channel|>final" not in v.prompt()


def test_a_key_is_asked_for_and_kept_for_the_tab_only(visit, browser):
    engine = ScriptedEngine(reply("ok"), repeat=True)
    with serve(engine, api_keys=["right-key"]) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        for key in ("wrong-key", "right-key"):
            page.get_by_label("Key", exact=True).fill(key)
            page.get_by_role("button", name="Continue").click()
            page.wait_for_timeout(100)
        playwright.expect(page.get_by_label("Model")).to_have_value(engine.name)
        assert "right-key" in page.evaluate("JSON.stringify(sessionStorage)")
        page.get_by_label("Message", exact=True).fill("Hello")
        page.keyboard.press("Enter")
        playwright.expect(page.locator(".answer")).to_have_text("ok")
        assert "right-key" not in page.evaluate("JSON.stringify(localStorage)")
        page.evaluate("sessionStorage.clear()")
        page.reload()  # another tab would be asked again
        playwright.expect(page.get_by_role("dialog", name="API key")).to_be_visible()
        page.get_by_role("button", name="Cancel").click()
        page.get_by_label("Message", exact=True).fill("Still there?")
        page.keyboard.press("Enter")
        page.get_by_label("Key", exact=True).fill("right-key")
        page.get_by_role("button", name="Continue").click()
        playwright.expect(page.locator(".answer").last).to_have_text("ok")
        assert len(engine.requests) == 2
        context.close()


def test_a_busy_server_is_told_kindly(visit):
    v = visit(ScriptedEngine(reply("now"), capacity=0))
    v.allowed.append("429")
    answer = v.ask("Hello?")
    fault = answer.get_by_text(
        re.compile(r"^The server is busy with other requests\. Try again in \d+ s\.$")
    )
    playwright.expect(fault).to_be_visible()
    v.engine.capacity = 1
    v.button("Try again").click()
    playwright.expect(v.page.locator(".answer")).to_have_text("now")
    playwright.expect(fault).to_have_count(0)
    assert "busy" not in v.prompt()


def test_a_failure_in_the_middle_keeps_what_came(visit):
    v = visit(ScriptedEngine(reply("word " * 40), fail_after=20))
    answer = v.ask("Hello?")
    playwright.expect(answer.locator(".answer")).to_contain_text("word word")
    playwright.expect(answer.locator(".fault")).to_contain_text("the server failed")
    playwright.expect(v.button("Try again")).to_be_visible()


def test_a_server_that_went_away(visit):
    v = visit(ScriptedEngine())
    v.allowed.append("ERR_INTERNET_DISCONNECTED")
    v.page.context.set_offline(True)
    answer = v.ask("Hello?")
    playwright.expect(answer.get_by_text("The server cannot be reached")).to_be_visible()


def test_a_cut_answer_says_so(visit):
    v = visit(ScriptedEngine(reply("one two three four five six seven")))
    v.settings(max_tokens="6")
    answer = v.ask("Count")
    playwright.expect(answer.locator(".notice")).to_contain_text("the limit of tokens")


def test_json_answers(visit):
    text = '{"answer": 632}'
    seen = []
    v = visit(ScriptedEngine(reply(text)))
    v.page.on("request", lambda r: seen.append(r.post_data_json) if r.method == "POST" else None)
    v.button("Settings").click()
    v.page.get_by_label("Answer format").select_option("json_schema")
    v.page.get_by_label("JSON schema", exact=True).fill('{"type": "object"}')
    v.button("Save").click()
    answer = v.ask("What is 347 + 285?")
    assert json.loads(answer.locator(".answer code").inner_text()) == json.loads(text)
    assert seen[0]["response_format"]["json_schema"]["schema"] == {"type": "object"}


CONTRAST = """() => {
    const channels = (color) => {
        const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
        const paint = canvas.getContext("2d");
        paint.fillStyle = color;
        paint.fillRect(0, 0, 1, 1);
        return [...paint.getImageData(0, 0, 1, 1).data];
    };
    const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (e) => {
        for (; e; e = e.parentElement) {
            const color = channels(getComputedStyle(e).backgroundColor);
            if (color[3] > 250) return color;
        }
        return [255, 255, 255];
    };
    const low = [];
    for (const e of document.querySelectorAll("body *")) {
        const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        if (!own || !e.checkVisibility() || e.closest(".hidden, option")) continue;
        const [a, b] = [luminance(channels(getComputedStyle(e).color)), luminance(behind(e))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) low.push([e.textContent.slice(0, 30), ratio]);
    }
    return low;
}"""


def test_light_and_dark(visit):
    text = (
        "Text, `code`, [link](https://a.example)\n\n> quote\n\n| a |\n|---|\n| b |\n\n```py\nx\n```"
    )
    v = visit(ScriptedEngine(reply(text, REASONING), repeat=True), color_scheme="dark")
    v.ask("Hello?")
    v.page.locator("summary").click()
    background = "getComputedStyle(document.body).backgroundColor"
    dark = v.page.evaluate(background)
    assert v.page.evaluate(CONTRAST) == []
    v.button("Theme").click()
    light = v.page.evaluate(background)
    numbers = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (dark, light)]
    assert numbers[0] < 150
    assert numbers[1] > 650
    assert v.page.evaluate(CONTRAST) == []
    v.page.reload()  # the choice stays, though the system is dark
    assert v.page.evaluate(background) == light


def test_a_phone_never_scrolls_sideways(visit):
    wide = "w" * 400
    text = f"{wide}\n\n```py\n{wide}\n```\n\n| {' | '.join('abcdefghijklmnop')} |\n|{'---|' * 16}\n\n`{wide}` <https://{wide}.example>"
    v = visit(
        ScriptedEngine(reply(text, wide), call(json.dumps({"expression": wide}), wide)),
        viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True,
    )  # fmt: skip
    fits = """() => [document.documentElement.scrollWidth <= innerWidth,
        document.getElementById("scroll").scrollWidth <= document.getElementById("scroll").clientWidth,
        document.getElementById("send").getBoundingClientRect().right <= innerWidth,
        document.getElementById("send").getBoundingClientRect().bottom <= innerHeight]"""
    assert all(v.page.evaluate(fits))
    v.settings(tools='[{"name": "calculator"}]', temperature="0.5", instructions="x")
    v.ask(wide)
    v.page.locator("summary").click()
    assert all(v.page.evaluate(fits))
    for wide_one in (".answer pre", ".table"):  # scrolls by itself instead
        scrolled = "(e) => { e.scrollLeft = 50; return e.scrollLeft; }"
        assert v.page.locator(wide_one).evaluate(scrolled) == 50
    v.ask("call", 2)
    assert all(v.page.evaluate(fits))
    v.button("Settings").click()
    assert v.page.evaluate("document.getElementById('settings').scrollWidth <= innerWidth")
    v.button("Cancel").click()
    playwright.expect(v.button("New chat")).to_be_hidden()
    v.button("Conversations").click()
    v.button("New chat").click()
    playwright.expect(v.button("New chat")).to_be_hidden()
    playwright.expect(v.page.get_by_role("article")).to_have_count(0)


def test_scrolling_follows_unless_the_reader_went_up(visit):
    lines = "\n\n".join(f"Line {i}" for i in range(150))
    v = visit(ScriptedEngine(reply(lines), delay=0.004), viewport={"width": 900, "height": 500})
    v.page.evaluate(
        """() => {
            window.shifts = 0;
            new PerformanceObserver((list) => list.getEntries().forEach((entry) => {
                window.shifts += entry.value;
            })).observe({type: "layout-shift", buffered: false});
        }"""
    )
    v.say("Count")
    left = "(() => { const s = document.getElementById('scroll'); return s.scrollHeight - s.scrollTop - s.clientHeight; })()"
    playwright.expect(v.page.get_by_text("Line 25")).to_be_visible()
    assert v.page.evaluate(left) < 80
    v.page.mouse.move(450, 200)
    v.page.mouse.wheel(0, -300)
    # Playwright's own wait_for_function polls with eval, which the page's policy forbids.
    until(lambda: v.page.evaluate(left) > 100)
    tops = [-1, -2]
    while tops[-1] != tops[-2]:  # the wheel's own movement goes on for a while
        v.page.wait_for_timeout(200)
        tops.append(v.page.evaluate("document.getElementById('scroll').scrollTop"))
    top = tops[-1]
    playwright.expect(v.page.get_by_text("Line 60")).to_be_attached()
    assert v.page.evaluate("document.getElementById('scroll').scrollTop") == top
    v.button("Go to the latest message").click()
    assert v.page.evaluate(left) < 80
    v.answered()
    v.page.wait_for_timeout(50)
    assert v.page.evaluate(left) < 5
    assert v.page.evaluate("shifts") < 0.01  # nothing moved but by scrolling


def test_keys_and_names(visit):
    v = visit(ScriptedEngine(reply("ok", REASONING)))
    box = v.page.get_by_label("Message", exact=True)
    playwright.expect(box).to_be_focused()
    v.page.keyboard.type("one")
    v.page.keyboard.press("Shift+Enter")
    v.page.keyboard.type("two")
    assert len(v.engine.requests) == 0
    v.page.keyboard.press("Enter")
    v.answered()
    assert "one\ntwo" in v.prompt()
    playwright.expect(box).to_have_value("")
    playwright.expect(box).to_be_focused()
    playwright.expect(v.page.get_by_role("log")).to_have_attribute("aria-live", "polite")
    v.button("Settings").click()
    nameless = v.page.evaluate(
        """[...document.querySelectorAll("button, input, textarea, select, summary, a")].filter((e) =>
            !(e.ariaLabel || e.labels?.length || e.textContent.trim())).map((e) => e.outerHTML)"""
    )
    assert nameless == []


def test_copying(visit):
    v = visit(
        ScriptedEngine(reply("Code:\n```py\nx = '<b>'\n```")),
        permissions=["clipboard-read", "clipboard-write"],
    )
    v.ask("Hello?")
    v.page.evaluate(
        """() => {
            window.names = new Set();
            new MutationObserver(() => document.querySelectorAll("button").forEach((button) => {
                names.add(button.ariaLabel || button.textContent.trim());
            })).observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true});
        }"""
    )
    v.button("Copy").click()
    until(lambda: v.page.evaluate("names.has('Copied')"))  # it is said for a second
    assert v.page.evaluate("navigator.clipboard.readText()") == "x = '<b>'"
    # as on a page over plain http from another machine
    v.page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    v.page.evaluate(
        "document.addEventListener('copy', () => { window.copied = document.activeElement.value; })"
    )
    v.button("Copy the answer").click()
    assert v.page.evaluate("copied") == "Code:\n```py\nx = '<b>'\n```"


def test_broken_storage_does_not_break_the_page(visit):
    v = visit(ScriptedEngine(reply("ok")))
    v.page.evaluate(
        """() => {
            localStorage.setItem("gptoss.conversation.a", "{not json");
            localStorage.setItem("gptoss.conversation.b", JSON.stringify({messages: [{role: "assistant"}, null]}));
            localStorage.setItem("gptoss.settings", "[]");
        }"""
    )
    v.page.reload()
    v.button("Untitled").click()
    playwright.expect(v.page.get_by_role("article")).to_have_count(2)
    v.button("New chat").click()
    v.ask("Hello?")
    # and where nothing can be kept
    v.page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); }; }")
    v.button("New chat").click()
    v.engine.scripts += (reply("still works"),)
    answer = v.ask("Hello?")
    assert answer.locator(".answer").inner_text() == "still works"
    playwright.expect(
        v.page.get_by_text("This browser keeps no more conversations")
    ).to_be_visible()


MARKDOWN = [
    "Plain text\nwith a second line",
    "**bold** and *italic* and __bold__ and _italic_ and ~~gone~~",
    "***both*** 2 * 3 * 4, a_b_c, **unclosed and `code **no** ` here",
    "`a` ``b ` c`` `d",
    "# One\n## Two\ntext\n### Three ###",
    "- a\n- b\n  - c\n  - d\n    1. e\n    2. f\n- g",
    "1. a\n2. b\n\n   more of b\n\n3. c",
    "7) seven\n8) eight",
    "- a\n\n- b\n\ntext after",
    "* a\n* b\n\n***\n\n+ c",
    "> quote **bold**\n> second\n\nafter",
    "> - a\n> - b",
    "```python\nx = '**no**'\n\n  <b>\n```\nafter",
    "~~~\n```\n~~~",
    "````\n```\ninside\n```\n````",
    "- a\n\n  ```sh\n  ls\n  ```\n- b",
    "| a | b |\n|---|:-:|\n| 1 | `x` |\n| 2 \\| 3 | **y** |",
    "a | b\n--|--\n1 | 2\n\nafter",
    "not | a table\nbecause",
    "[a](https://a.example) and [b c](http://b.example/x?y=1&z=(2)) end",
    "escaped \\*stars\\* and \\[brackets\\](x)",
    "---\n\ntext\n\n- - -",
    "text\n- item\n\n1986\\. A year",
]


class Shape(html.parser.HTMLParser):
    """The tags and text of HTML, without what is only a matter of style."""

    def __init__(self):
        super().__init__()
        self.out: list[str] = []
        self.pre = 0

    def handle_starttag(self, tag, attrs):
        self.pre += tag == "pre"
        if tag not in ("p", "span"):
            self.out.append(f"<{tag}>")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        self.pre -= tag == "pre"
        if tag not in ("p", "span"):
            self.out.append(f"</{tag}>")

    def handle_data(self, data):
        if self.pre or data.strip():
            text = data.rstrip("\n") if self.pre else data.strip()
            if self.out and not self.out[-1].startswith("<"):
                self.out[-1] += text
            elif text:
                self.out.append(text)


def shape(text: str) -> list[str]:
    parser = Shape()
    parser.feed(text)
    return parser.out


def test_markdown_is_what_commonmark_says(visit):
    """Compared with markdown-it; headings are one level lower, and lines break where they do."""
    from markdown_it import MarkdownIt

    reference = MarkdownIt("commonmark", {"html": False, "breaks": True, "linkify": False})
    reference.enable(["table", "strikethrough"])
    v = visit(ScriptedEngine())
    render = """async (source) => {
        const { showMarkdown } = await import("/page/markdown.js");
        const box = document.createElement("div");
        showMarkdown(box, source);
        box.querySelectorAll(".code-head").forEach((head) => head.remove());
        box.querySelectorAll("figure, .table").forEach((wrap) => wrap.replaceWith(...wrap.childNodes));
        return box.innerHTML;
    }"""
    for source in MARKDOWN:
        expected = reference.render(source)
        expected = re.sub(r"(</?h)(\d)", lambda m: f"{m[1]}{int(m[2]) + 1}", expected)
        expected = re.sub(r"<(/?)s>", r"<\1del>", expected)
        assert shape(v.page.evaluate(render, source)) == shape(expected), source


def test_markdown_streams_to_the_same_and_never_hangs(visit):
    """Piece by piece ends as all at once, on text made of nothing but marks; only known elements
    appear; long hostile lines take no time.
    """
    v = visit(ScriptedEngine())
    found = v.page.evaluate(
        """async () => {
            const { showMarkdown } = await import("/page/markdown.js");
            const marks = ["*", "**", "_", "`", "```", "~~", "[", "](", ")", "](https://a.b)", "|", "---", "- ", "1. ",
                "> ", "# ", "\\n", "\\n\\n", "\\\\", " ", "  ", "a", "b c", "<img src=x>", "javascript:", "!", "https://x.y"];
            let state = 12345;
            const random = (n) => (state = (state * 1103515245 + 12345) % 2147483648) % n;
            const known = new Set("P H2 H3 H4 H5 H6 UL OL LI SPAN BLOCKQUOTE HR TABLE THEAD TBODY TR TH TD DIV FIGURE PRE CODE BUTTON STRONG EM DEL A BR".split(" "));
            const wrong = [];
            for (let i = 0; i < 400; i++) {
                const source = Array.from({length: 40}, () => marks[random(marks.length)]).join("");
                const [whole, grown] = [document.createElement("div"), document.createElement("div")];
                showMarkdown(whole, source);
                for (let at = 0; at < source.length; at += 1 + random(9)) showMarkdown(grown, source.slice(0, at));
                showMarkdown(grown, source);
                if (!whole.isEqualNode(grown)) wrong.push(["differs", source]);
                for (const e of whole.querySelectorAll("*")) if (!known.has(e.tagName)) wrong.push([e.tagName, source]);
                for (const a of whole.querySelectorAll("a")) if (!/^https?:/.test(a.href)) wrong.push([a.href, source]);
            }
            const start = performance.now();
            for (const mark of marks.concat("**a ", "[a](", "> > ", "- - ", "| a ", "|-", "`a", "# #", "*a", "_a_b")) {
                showMarkdown(document.createElement("div"), mark.repeat(20000));
            }
            return [wrong, performance.now() - start];
        }"""
    )
    wrong, milliseconds = found
    assert wrong == []
    assert milliseconds < 10_000


class Inline(html.parser.HTMLParser):
    """Collects what a strict policy would refuse, and what is loaded from where."""

    def __init__(self):
        super().__init__()
        self.refused: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        names = dict(attrs)
        self.refused += [f"{tag} {n}" for n in names if n.startswith("on") or n == "style"]
        if tag == "style" or (tag == "script" and "src" not in names):
            self.refused.append(tag)
        self.addresses += [value for n, value in attrs if n in ("src", "href") and value[0] != "#"]


def test_the_files_need_nothing_but_themselves():
    found = files.files()
    parser = Inline()
    parser.feed(found["/"].content.decode())
    assert parser.refused == []
    assert {f"/{address}" for address in parser.addresses} <= found.keys()
    imported = [
        name
        for path, file in found.items()
        if path.endswith(".js")
        for name in re.findall(r'from "\./([^"]+)"', file.content.decode())
    ]
    assert {f"/page/{name}" for name in imported} <= found.keys()
    text = b"".join(file.content for file in found.values()).decode()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "url("):
        assert word not in text, word
    assert "unsafe" not in files.CONTENT_SECURITY_POLICY


def test_the_server_sends_the_files_with_their_headers(visit):
    import httpx

    with serve(ScriptedEngine(), api_keys=["secret"]) as address:
        for path, file in files.files().items():
            answer = httpx.get(address + path)
            assert answer.status_code == 200, path  # no key: the page asks for it
            assert answer.content == file.content
            assert answer.headers["content-type"] == file.media_type
            for name, value in files.HEADERS.items():
                assert answer.headers[name] == value
            again = httpx.get(address + path, headers={"If-None-Match": answer.headers["etag"]})
            assert again.status_code == 304
        assert httpx.get(address + "/page/../__init__.py").status_code in (401, 404)
        assert httpx.get(address + "/page/__init__.py").status_code in (401, 404)


@pytest.mark.slow
def test_the_real_model_answers_for_readme(browser, tmp_path):
    """gptoss serve in a process of its own, and the script that makes README's pictures."""
    from make_page_screenshots import make

    make(browser, tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"light.png", "dark.png", "phone.png"}
    assert max(sizes.values()) < 150_000
