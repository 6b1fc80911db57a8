"""
The page in a real browser, by hand (it needs Debian's chromium and `pip install playwright`):

    python tests/browser.py out/lm out/diffusion out/lora-chat /tmp

opens the page of each run, types, clicks, sees text stream in and stop, pictures, answers in a chat, an error
as a toast, a curve that grows, and no request to another machine. Look at the screenshots, which are in the
last folder.
"""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

LM, DIFFUSION, CHAT, SCREENSHOTS = (Path(name).resolve() for name in sys.argv[1:])
SAMPLE, PORT = Path(__file__).parent.parent / "sample.py", 7861
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def check(what, fact):
    print(what, fact or sys.exit(f"FAILED: {what}"), flush=True)


@contextlib.contextmanager
def demo(browser, folder, *arguments):
    """Yield a page for the run. In the end, it must not have asked another machine for anything."""
    command = [sys.executable, SAMPLE, f"--out_dir={folder}", "--demo=True", f"--port={PORT}", *arguments]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    asked, url = [], f"http://127.0.0.1:{PORT}/"
    try:
        found = any("Running on local URL" in line for line in iter(server.stderr.readline, ""))
        check(f"the page of {folder.name} is at {url}", found)
        page = browser.new_page(viewport={"width": 1280, "height": 1120})
        page.on("request", lambda request: asked.append(request.url.replace("localhost", "127.0.0.1")))
        page.set_default_timeout(100_000)
        page.goto(url)
        yield page
        others = [name for name in asked if not re.match(rf"(data:|blob:|{url})", name)]
        check(f"{len(asked)} requests, none to another machine {others}", not others)
        page.close()
    finally:
        server.terminate()
        server.wait()


def show_text(browser, runs):
    for name in ("this", "other"):
        shutil.copytree(LM, runs / name)  # its curve is written on
    with demo(browser, runs / "this", f"--compare={runs}/*", "--max_new_tokens=2000") as page:
        prompt, shown = page.locator("textarea").first, page.locator("textarea").nth(1)
        prompt.fill("x = 1\n" * 1000)
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_test_id("toast-body")).to_contain_text("the prompt has", timeout=20000)
        page.screenshot(path=SCREENSHOTS / "toast.png")
        prompt.fill("def read(path):\n")
        for wait in range(300, 2000, 300):
            page.get_by_role("button", name="Generate").click()
            expect(shown).to_have_value(re.compile("def read.*\n.*", re.DOTALL), timeout=20000)
            page.wait_for_timeout(wait)
            page.get_by_role("button", name="Stop").click()
            page.wait_for_timeout(1000)
            stopped = shown.input_value()
            page.wait_for_timeout(1000)
            check(f"stopped after {len(stopped)} letters", shown.input_value() == stopped)
        check("without an error", page.get_by_text("Error", exact=True).count() == 0)
        plot = page.locator("canvas, svg.marks").first
        before = plot.screenshot()
        with (runs / "this" / "metrics.jsonl").open("a") as metrics:
            for step in range(10000, 11000, 10):
                metrics.write(json.dumps({"step": step, "val/loss": 3.0}) + "\n")
        page.screenshot(path=SCREENSHOTS / "text.png")
        page.wait_for_timeout(15000)
        check("the loss curve goes on with the run", before != plot.screenshot())


def show_chat(browser):
    with demo(browser, CHAT, "--chat=True", "--max_new_tokens=20") as page:
        for message in ("Hello?", "too long " * 9999, "And you?"):  # a refusal locks nothing
            page.locator("textarea").first.fill(message)
            page.keyboard.press("Enter")
            page.wait_for_timeout(5000)
        check("two answers", page.locator(".bot.message").count() == 2)
        page.screenshot(path=SCREENSHOTS / "chat.png")


def show_pictures(browser):
    with demo(browser, DIFFUSION, "--num_samples=8") as page:
        page.get_by_role("button", name="Generate").click()
        expect(page.locator(".grid-container img")).to_have_count(8, timeout=60000)
        page.screenshot(path=SCREENSHOTS / "pictures.png")


if __name__ == "__main__":
    with sync_playwright() as p, tempfile.TemporaryDirectory() as folder:
        browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=QUIET)
        show_text(browser, Path(folder))
        show_pictures(browser)
        show_chat(browser)
