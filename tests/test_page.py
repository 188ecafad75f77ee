"""The server's page in a browser: what people see and do, and what a model must not be able to do to them.

The page is served by a stub that sends what each test wants, byte by byte where it matters, with the headers of the
real server. Needs playwright and a Chromium; skipped where there is none.
"""

import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("fastapi")

from serving.documents import page_headers  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "serving" / "chat.html").read_bytes()
PATIENCE = 60_000  # ms for something to appear; only a failing test waits so long
HOSTILE = ("<script>window.hacked=1</script><img src=x onerror=window.hacked=1> "
           "[a](javascript:window.hacked=1) [b](data:text/html,<script>window.hacked=1</script>) "
           "![c](https://elsewhere.example/c.png) [d](JaVaScRiPt:window.hacked=1) <a href='javascript:1'>e</a>")


def chromium():
    """The path of a browser on this machine, None for playwright's own, or a skip."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    with sync_api.sync_playwright() as playwright:
        if Path(playwright.chromium.executable_path).exists():
            return None
    pytest.skip("no Chromium: apt install chromium, or playwright install chromium")


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


# -----------------------------------------------------------------------------
# A stub of the server


def event(text=None, **fields):
    """The bytes of one event of a stream, with a piece of text or other fields."""
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
    return b"data: " + json.dumps({"choices": choices, **fields}, ensure_ascii=False).encode() + b"\n\n"


def usage(prompt=20, completion=5):
    return event(usage={"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})


def said(text, *more):
    """The pieces of a whole stream that says this text."""
    return [event(text), *more, usage(), b"data: [DONE]\n\n"]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        stub = self.server.stub
        stub.paths.append(self.path)
        if self.path == "/":
            self.answer(200, PAGE, page_headers(PAGE))
        elif self.path == "/v1/models":
            entry = {"id": "tiny", "object": "model", "created": 1, "owned_by": "minichat", "context_length": 256,
                     "chat": stub.chat}
            self.answer(stub.status, json.dumps({"object": "list", "data": [entry]}).encode(), {})
        else:
            self.answer(404, b"{}", {})

    def do_POST(self):
        stub = self.server.stub
        stub.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub.bodies.append(body)
        stub.keys.append(self.headers.get("Authorization"))
        reply = stub.replies.pop(0) if stub.replies else said("Well.")
        if isinstance(reply, tuple):
            status, message, headers = reply
            content = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}}).encode()
            return self.answer(status, content, headers)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for piece in reply:
                if isinstance(piece, threading.Event):
                    piece.wait(PATIENCE / 1000)
                else:
                    self.wfile.write(piece)
                    self.wfile.flush()
        except OSError:
            stub.left.set()

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class Stub:
    """A server that gives the `replies` of a test: lists of pieces of a stream, in which an Event holds the rest back,
    or (status, message, headers) of an error."""

    def __init__(self):
        self.replies = []
        self.bodies = []
        self.keys = []
        self.paths = []
        self.chat = True
        self.status = 200
        self.left = threading.Event()  # a client went away while it was written to
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.stub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def stub():
    stub = Stub()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


@pytest.fixture
def visit(browser, stub):
    """visit(**options of a context) -> the page, loaded. At the end: nothing was asked of another server, nothing was
    blocked by the policy, no script failed."""
    contexts = []
    faults = []

    def visit(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
        page.on("request", lambda request: None if request.url.startswith((stub.url, "data:", "blob:"))
                else faults.append(request.url))
        page.goto(stub.url)
        page.wait_for_selector("#examples button")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not faults


def say(page, text):
    page.fill("#input", text)
    page.press("#input", "Enter")


def talk(page, text):
    """Say something and wait for the end of the answer."""
    count = page.locator(".assistant").count()
    say(page, text)
    page.wait_for_selector(f".assistant >> nth={count}")
    page.wait_for_selector("#send:visible")


def last(page):
    return page.locator(".assistant .text").last


# -----------------------------------------------------------------------------
# A stream


def test_a_stream_may_be_cut_anywhere(visit, stub):
    """Between and within events, and within a character."""
    text = "Grüße, 你好, 🙂! **bold**"
    whole = b"".join(said(text))
    stub.replies = [[bytes([byte]) for byte in whole]]
    page = visit()
    talk(page, "Hello")
    assert last(page).inner_text() == "Grüße, 你好, 🙂! bold"
    assert last(page).locator("strong").inner_text() == "bold"
    body = stub.bodies[0]
    assert body["messages"] == [{"role": "user", "content": "Hello"}]
    assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["temperature"] == 0.8
    assert "seed" not in body and "max_tokens" not in body


def test_an_answer_shows_while_it_comes_and_can_be_stopped(visit, stub):
    held = threading.Event()
    stub.replies = [[event("First words"), held, *[event("x" * 1000)] * 1000]]
    page = visit()
    say(page, "Hello")
    page.wait_for_selector("text=First words")
    assert page.locator("#stop").is_visible() and not page.locator("#send").is_visible()
    page.press("#input", "Escape")
    page.wait_for_selector("#send:visible")
    assert "stopped" in page.locator(".figures").inner_text()
    assert last(page).inner_text() == "First words"
    held.set()
    assert stub.left.wait(PATIENCE / 1000), "the connection is still there"
    talk(page, "Go on")  # and what was said so far is part of the talk
    assert stub.bodies[1]["messages"][1] == {"role": "assistant", "content": "First words"}


def test_figures_and_context_are_shown(visit, stub):
    stub.replies = [[event("One"), event(" two"), usage(100, 28), b"data: [DONE]\n\n"]]
    page = visit()
    talk(page, "Count")
    assert "28 tokens" in page.locator(".figures").inner_text()
    assert "128 of 256 tokens of context" in page.locator("#used").inner_text()
    assert page.locator("#meter").evaluate("node => node.value") == 0.5


def test_dropped_turns_are_said(visit, stub):
    stub.replies = [said("Yes"), [event("No", dropped_messages=2), usage(), b"data: [DONE]\n\n"]]
    page = visit()
    talk(page, "One")
    talk(page, "Two")
    assert "oldest 2 messages are no longer read" in page.locator(".remark").inner_text()


# -----------------------------------------------------------------------------
# What people do


def test_another_answer_and_an_edited_question(visit, stub):
    stub.replies = [said("A"), said("B"), said("C"), said("D")]
    page = visit()
    talk(page, "One")
    page.get_by_role("button", name="Another answer").click()
    page.wait_for_selector(".assistant .text:has-text('B')")
    page.wait_for_selector("#send:visible")
    assert stub.bodies[1]["messages"] == [{"role": "user", "content": "One"}]
    talk(page, "Two")
    page.get_by_role("button", name="Edit and send again").first.click()
    page.get_by_label("Edit the message").fill("Three")
    page.locator(".editing").get_by_role("button", name="Send").click()
    page.wait_for_selector(".assistant .text:has-text('D')")
    page.wait_for_selector("#send:visible")
    assert stub.bodies[3]["messages"] == [{"role": "user", "content": "Three"}]
    assert page.locator(".message").count() == 2


def test_messages_and_code_are_copied(visit, stub):
    stub.replies = [said("Look:\n\n```python\nprint('hi')\n```\n")]
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    talk(page, "Code, please")
    assert page.locator(".code .bar span").inner_text() == "python"
    page.locator(".code button").click()
    assert page.evaluate("navigator.clipboard.readText()") == "print('hi')"
    page.get_by_role("button", name="Copy message").last.click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("Look:")


def test_settings_are_sent_and_kept(visit, stub):
    page = visit()
    page.click("#settings")
    for name, value in (("system", "Be brief"), ("temperature", "0"), ("top_p", "0.5"), ("max_tokens", "7"),
                        ("seed", "3"), ("key", "sesame")):
        page.fill(f"#{name}", value)
    page.click("#close")
    talk(page, "Hello")
    body = stub.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief"}
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (0, 0.5, 7, 3)
    assert stub.keys[0] == "Bearer sesame"
    page.reload()
    page.wait_for_selector("#examples button")
    page.click("#settings")
    assert page.input_value("#system") == "Be brief"
    page.click("#reset")
    page.click("#close")
    talk(page, "Hello")
    assert stub.bodies[1]["messages"] == [{"role": "user", "content": "Hello"}]
    stored = page.evaluate("JSON.stringify({...localStorage})")
    assert "sesame" not in stored


def test_conversations_stay_and_are_renamed_searched_and_deleted(visit, stub):
    stub.replies = [said("About apples"), said("About pears")]
    page = visit()
    talk(page, "First question")
    page.click("#new")
    talk(page, "Second question")
    page.reload()
    page.wait_for_selector("#examples button")
    titles = page.locator("#list .title")
    assert titles.all_inner_texts() == ["Second question", "First question"]
    page.fill("#search", "apples")
    assert titles.all_inner_texts() == ["First question"]
    titles.first.click()
    assert last(page).inner_text() == "About apples"
    page.fill("#search", "")
    page.get_by_role("button", name="Rename First question").click()
    page.get_by_label("Name of the conversation").fill("Fruit")
    page.get_by_label("Name of the conversation").press("Enter")
    assert sorted(titles.all_inner_texts()) == ["Fruit", "Second question"]
    page.get_by_role("button", name="Delete Fruit").click()
    assert titles.all_inner_texts() == ["Second question"]
    page.get_by_role("button", name="Undo").click()
    assert sorted(titles.all_inner_texts()) == ["Fruit", "Second question"]


def test_conversations_are_exported_and_imported(visit, stub, tmp_path):
    page = visit()
    talk(page, "Keep this")
    with page.expect_download() as download:
        page.click("#export")
    path = tmp_path / "conversations.jsonl"
    download.value.save_as(path)
    (line,) = path.read_text(encoding="utf-8").splitlines()
    messages = [{"role": "user", "content": "Keep this"}, {"role": "assistant", "content": "Well."}]
    assert json.loads(line)["messages"] == messages
    other = visit()
    other.set_input_files("#file", path)
    other.locator("#list .title").click()
    assert last(other).inner_text() == "Well."


@pytest.mark.parametrize("broken", ["{", "[1, null, {\"messages\": 3}]", "null", "[[]]", "{\"id\": {}}"])
def test_broken_storage_is_no_end(visit, stub, broken):
    page = visit()
    page.evaluate("text => { onpagehide = null; localStorage.setItem('minichat.settings', text); }", broken)
    page.evaluate("text => addEventListener('pagehide', () => localStorage.setItem('minichat.conversations', text))",
                  broken)
    page.reload()
    page.wait_for_selector("#examples button")
    talk(page, "Still here?")
    assert last(page).inner_text() == "Well."


def test_the_keyboard(visit, stub):
    page = visit()
    page.fill("#input", "one")
    page.press("#input", "Shift+Enter")
    page.keyboard.type("two")
    page.press("#input", "Enter")
    page.wait_for_selector(".figures")
    assert stub.bodies[0]["messages"][0]["content"] == "one\ntwo"
    page.keyboard.press("Control+Shift+O")
    assert page.locator("#empty").is_visible()
    assert page.evaluate("document.activeElement.id") == "input"


def test_scrolling_up_is_respected(visit, stub):
    held = threading.Event()
    stub.replies = [[event("line\n\n" * 200), held, event("the end"), usage(), b"data: [DONE]\n\n"]]
    page = visit()
    say(page, "Much")
    page.wait_for_function("document.getElementById('scroll').scrollTop > 1000")
    page.evaluate("document.getElementById('scroll').scrollTop = 100")
    page.wait_for_selector("#down:visible")
    held.set()
    page.wait_for_selector("#send:visible")
    assert page.evaluate("document.getElementById('scroll').scrollTop") == 100
    page.click("#down")
    assert page.evaluate("document.getElementById('scroll').scrollTop") > 1000


def test_a_model_without_a_template_continues(visit, stub):
    stub.chat = False
    stub.replies = [[b'data: {"choices": [{"index": 0, "text": " there **was**", "finish_reason": "length"}]}\n\n',
                     usage(), b"data: [DONE]\n\n"]]
    page = visit()
    assert "continues what you write" in page.locator("#about").inner_text()
    talk(page, "Once")
    assert stub.bodies[0]["prompt"] == "Once" and "messages" not in stub.bodies[0]
    assert last(page).inner_text() == " there **was**".strip()


# -----------------------------------------------------------------------------
# What goes wrong


def test_errors_are_said_and_can_be_retried(visit, stub):
    stub.replies = [(500, "the engine failed", {}), said("Better")]
    page = visit()
    say(page, "Hello")
    page.wait_for_selector(".error")
    assert "the engine failed" in page.locator(".error").inner_text()
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector(".assistant .text:has-text('Better')")
    assert stub.bodies[0]["messages"] == stub.bodies[1]["messages"]
    assert page.locator(".error").count() == 0


def test_a_busy_server_says_when(visit, stub):
    stub.replies = [(429, "full", {"retry-after": "1"}), said("Now")]
    page = visit()
    say(page, "Hello")
    page.wait_for_selector(".error")
    assert "busy" in page.locator(".error").inner_text() and "1 s" in page.locator(".error").inner_text()
    page.get_by_role("button", name="Try again").click()  # waits until it is enabled
    page.wait_for_selector(".assistant .text:has-text('Now')")


def test_an_error_amid_a_stream_keeps_what_was_said(visit, stub):
    error = b'data: {"error": {"message": "the engine failed", "type": "server_error"}}\n\n'
    stub.replies = [[event("Half"), error], [event("Half of"), usage()]]
    page = visit()
    say(page, "Hello")
    page.wait_for_selector(".error")
    assert "the engine failed" in page.locator(".error").inner_text() and last(page).inner_text() == "Half"
    page.get_by_role("button", name="Try again").click()  # and a stream that ends without [DONE]
    page.wait_for_selector(".error:has-text('broke off')")
    assert last(page).inner_text() == "Half of"


def test_no_server_is_said(visit, stub):
    page = visit()
    stub.server.shutdown()
    stub.server.server_close()
    say(page, "Hello")
    page.wait_for_selector(".error:has-text('cannot be reached')")
    assert page.locator(".user").count() == 1


def test_a_server_with_a_key_asks_for_it(visit, stub):
    stub.replies = [(401, "an API key is needed", {}), said("Open")]
    page = visit()
    say(page, "Hello")
    page.wait_for_selector("#dialog[open]")
    assert page.evaluate("document.activeElement.id") == "key"
    page.fill("#key", "sesame")
    page.click("#close")
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector(".assistant .text:has-text('Open')")
    assert stub.keys[-1] == "Bearer sesame"


# -----------------------------------------------------------------------------
# What nobody may do to the reader


def nothing_ran(page):
    bad = "a[href^='javascript' i], a[href^='data' i], #talk script, #talk img, #talk iframe, [onerror]"
    return page.evaluate("window.hacked") is None and page.locator(bad).count() == 0


def test_what_is_said_cannot_run(visit, stub, tmp_path):
    stub.replies = [said(HOSTILE)]
    page = visit()
    talk(page, HOSTILE)
    assert nothing_ran(page)
    assert "<script>" in last(page).inner_text()
    assert page.locator("#talk a").evaluate_all("nodes => nodes.map(node => node.rel)") == ["noopener noreferrer"]
    page.reload()
    page.wait_for_selector("#examples button")
    page.locator("#list .title").first.click()
    assert nothing_ran(page)
    path = tmp_path / "hostile.jsonl"
    messages = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]
    path.write_text(json.dumps({"title": HOSTILE, "messages": messages}) + "\n")
    page.set_input_files("#file", path)
    page.locator("#list .title").last.click()
    assert nothing_ran(page)


def test_no_html_is_ever_parsed():
    text = PAGE.decode()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", " style=",
                 "onclick=\"", "http://cdn", "https://cdn", "src=\"http"):
        assert word not in text, word


MARKDOWN = """\
# Title

Some *emphasis*, **strong words**, ~~gone~~, `code *here*`, snake_case_name and 2 * 3 * 4.

- one
- two
  1. inner
  2. more

> quoted
> still

| a | b |
|---|--:|
| 1 | 2 |

See [a page](https://example.org/a_(b)) or https://example.org/x.

***

```
open fence <b>
"""


def test_markdown_becomes_what_it_means(visit, stub):
    stub.replies = [said(MARKDOWN)]
    page = visit()
    talk(page, "Show")
    text = last(page)
    assert text.locator("h1").inner_text() == "Title"
    assert text.locator("p em").all_inner_texts() == ["emphasis"]
    assert text.locator("p strong").all_inner_texts() == ["strong words"]
    assert text.locator("del").inner_text() == "gone" and text.locator("p code").inner_text() == "code *here*"
    assert "snake_case_name and 2 * 3 * 4" in text.inner_text()
    assert text.locator("ul > li").count() == 2 and text.locator("ul ol > li").all_inner_texts() == ["inner", "more"]
    assert text.locator("blockquote p").inner_text() == "quoted still"
    assert text.locator("td").all_inner_texts() == ["1", "2"] and text.locator("td.right").count() == 1
    links = text.locator("a").evaluate_all("nodes => nodes.map(node => node.href)")
    assert links == ["https://example.org/a_(b)", "https://example.org/x"]
    assert text.locator("hr").count() == 1 and text.locator("pre").inner_text().strip() == "open fence <b>"


@pytest.mark.parametrize("unit", ["*a ", "`", "[", "> ", "- ", "  - x\n", "**_", "![](", "| a ", "\\", "`a``b", "#",
                                  "1. ", "https://a"])
def test_markdown_takes_time_that_grows_with_the_text_alone(visit, stub, unit):
    """Ten times the text takes at most forty times as long, for texts that some renderers take quadratic time for."""
    page = visit()
    measure = """unit => {
        const time = (count) => {
            const text = unit.repeat(count / unit.length);
            const began = performance.now();
            let runs = 0;
            do { markdown(text); runs += 1; } while (performance.now() - began < 40);
            return (performance.now() - began) / runs;
        };
        time(3000);
        return time(60000) / time(6000);
    }"""
    # the least of several: a busy machine can only make one of them larger
    assert any(page.evaluate(measure, unit) < 40 for _ in range(5))


# -----------------------------------------------------------------------------
# Everybody


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)])
def test_axe_finds_no_barrier(visit, stub, scheme, width):
    playwright_axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    stub.replies = [said(MARKDOWN), (500, "the engine failed", {})]
    page = visit(color_scheme=scheme, viewport={"width": width, "height": 780}, reduced_motion="reduce",
                 bypass_csp=True)  # axe is a script of its own
    axe = playwright_axe.Axe()

    def barriers():
        results = axe.run(page).response["violations"]
        return [(entry["id"], [node["html"] for node in entry["nodes"]][:3]) for entry in results]

    assert not barriers(), "empty"
    talk(page, "Show")
    say(page, "And now?")
    page.wait_for_selector(".error")
    assert not barriers(), "a talk with an error"
    if width == 390:
        page.click("#menu")
        page.wait_for_selector("body.open")
        assert not barriers(), "the list"
        page.keyboard.press("Escape")
    page.click("#settings")
    assert not barriers(), "settings"


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_screen(visit, stub, width):
    stub.replies = [said(MARKDOWN + "x" * 3000 + "\n```\n" + "a" * 500)]
    page = visit(viewport={"width": width, "height": 700})
    for step in ("empty", "talk"):
        if step == "talk":
            talk(page, "y" * 2000)
        overflow = page.evaluate("[...document.querySelectorAll('body, main, header, .composer, #talk, .message')]"
                                 ".filter(node => node.getBoundingClientRect().right > innerWidth + 1)"
                                 ".map(node => node.className || node.tagName)")
        assert not overflow, step


def test_colours_follow_the_system_or_the_choice(visit, stub):
    page = visit(color_scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.click("#theme")  # light
    assert page.evaluate(colour) != dark
    page.reload()
    page.wait_for_selector("#examples button")
    assert page.evaluate(colour) != dark
    page.click("#theme")  # dark
    assert page.evaluate(colour) == dark


def test_a_model_that_is_being_loaded_is_waited_for(browser, stub):
    stub.status = 503
    context = browser.new_context()
    page = context.new_page()
    page.goto(stub.url)
    deadline = time.monotonic() + PATIENCE / 1000
    while stub.paths.count("/v1/models") < 2 and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    stub.status = 200
    page.wait_for_selector("#examples button", timeout=PATIENCE)
    context.close()
