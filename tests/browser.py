"""
The page in a real browser, by hand (it needs Debian's chromium and `pip install playwright`):

    python tests/browser.py out/lm out/diffusion --chat=out/lora-chat --screenshots=/tmp

opens the page of each, types, clicks, sees text stream in and stop, pictures, answers in a chat, an error as a toast,
a curve that grows, and no request to another machine. Look at the screenshots.
"""

import argparse
import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parent.parent
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def check(what, fact):
    print(what, fact or sys.exit(f"FAILED: {what}"), flush=True)


@contextlib.contextmanager
def demo(browser, folder, *arguments):
    """-> a page for the run; in the end it must have asked no other machine for anything."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "sample.py", f"--out_dir=out/{folder.name}", "--demo=True"]
    command += [f"--port={port}", *arguments]
    server = subprocess.Popen(command, cwd=folder.parent.parent, stderr=subprocess.PIPE, text=True)
    asked, url = [], f"http://127.0.0.1:{port}/"
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


def text(browser, folder, screenshots):
    with demo(browser, folder, "--compare=out/*", "--max_new_tokens=2000") as page:
        prompt, shown = page.locator("textarea").first, page.locator("textarea").nth(1)
        prompt.fill("x = 1\n" * 1000)
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_test_id("toast-body")).to_contain_text("the prompt has", timeout=20000)
        page.screenshot(path=screenshots / "toast.png")
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
        with (folder / "metrics.jsonl").open("a") as metrics:
            for step in range(10000, 11000, 10):
                metrics.write(json.dumps({"step": step, "val/loss": 3.0}) + "\n")
        page.screenshot(path=screenshots / "text.png")
        page.wait_for_timeout(15000)
        check("the loss curve goes on with the run", before != plot.screenshot())


def chat(browser, folder, screenshots):
    with demo(browser, folder, "--chat=True", "--max_new_tokens=20") as page:
        for message in ("Hello?", "And you?"):
            page.locator("textarea").first.fill(message)
            page.keyboard.press("Enter")
            page.wait_for_timeout(5000)
        check("two answers", page.locator(".bot.message").count() == 2)
        page.screenshot(path=screenshots / "chat.png")


def pictures(browser, folder, screenshots):
    with demo(browser, folder, "--num_samples=8") as page:
        page.get_by_role("button", name="Generate").click()
        expect(page.locator(".grid-container img")).to_have_count(8, timeout=60000)
        page.screenshot(path=screenshots / "pictures.png")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("lm", type=Path)
    parser.add_argument("diffusion", type=Path)
    parser.add_argument("--chat", type=Path)
    parser.add_argument("--screenshots", type=Path, default=Path())
    args = parser.parse_args()
    with sync_playwright() as p, tempfile.TemporaryDirectory() as folder:
        browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=QUIET)
        for scene, run in ((text, args.lm), (pictures, args.diffusion), (chat, args.chat)):
            if run:
                copy = Path(folder, "out", run.name)  # its curve is written on
                shutil.copytree(run, copy)
                shutil.copytree(run, copy.with_name("other"), dirs_exist_ok=True)
                scene(browser, copy, args.screenshots)


if __name__ == "__main__":
    main()
