"""
Pictures of the page for docs/: a talk with the model of a running server, light, dark and on a phone.

    python serve.py --out_dir=out/smollm2 &
    python tests/screenshots.py http://127.0.0.1:8000

Needs playwright and a Chromium. The answers are greedy, so the pictures are the same on the same machine.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

DOCS = Path(__file__).resolve().parents[1] / "docs"
QUESTIONS = ("What are the three states of matter?", "Write a Python function that adds two numbers.")
OTHERS = ("A poem about rain", "How do magnets work?", "Plan a weekend in Lisbon")  # titles in the list
VIEWS = {  # name: (colours, width, height)
    "serve_light": ("light", 1200, 800),
    "serve_dark": ("dark", 1200, 800),
    "serve_mobile": ("light", 390, 780),
}


def talk(page):
    """Ask the questions, and wait for each answer."""
    page.click("#settings")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "160")
    page.click("#close")
    for count, question in enumerate(QUESTIONS):
        page.fill("#input", question)
        page.press("#input", "Enter")
        page.wait_for_selector(f".figures >> nth={count}", timeout=300_000)


def main(url):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        kept = None  # what the browser has kept after the talk: the other views show the same
        for name, (colours, width, height) in VIEWS.items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=colours,
                                          storage_state=kept)
            page = context.new_page()
            page.goto(url)
            page.wait_for_selector("#examples button")
            if kept is None:
                talk(page)
                for title in OTHERS:
                    page.evaluate("""title => {
                        const messages = [{ role: "user", content: title }];
                        conversations.push({ id: newId(), title, changed: 0, system: null, messages });
                        save(true);
                    }""", title)
                kept = context.storage_state()
                page.reload()
                page.wait_for_selector("#examples button")
            page.locator("#list .title").first.evaluate("node => node.click()")
            page.mouse.move(width / 2, height / 2)
            page.wait_for_timeout(500)
            page.screenshot(path=DOCS / f"{name}.png")
            context.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
