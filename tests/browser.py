"""
The demo in a real browser, by hand (it needs Debian's chromium and `pip install playwright`):

    python tests/browser.py out/lm out/diffusion --screenshots=/tmp

opens the demo of a language model's run and of a diffusion model's, types, clicks, sees text stream in and stop,
pictures come and be downloaded, an error as a toast, a loss curve that grows with the run, and no request to any
other machine. The screenshots are to be looked at; assets/demo.png is one of them.
"""

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parent.parent
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]
PROMPT = "def read_lines(path):\n"


def check(what, fact):
    print(f"{'ok  ' if fact else 'FAIL'}  {what}", flush=True)
    if not fact:
        raise SystemExit(1)


@contextmanager
def demo(browser, folder, *arguments):
    """-> a page on the demo of a run; in the end it must have asked no other machine for anything."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "sample.py", f"--out_dir=out/{folder.name}", "--demo=True"]
    command += [f"--port={port}", *arguments]
    server = subprocess.Popen(command, cwd=folder.parent.parent, stderr=subprocess.PIPE, text=True)
    asked = []
    try:
        lines = iter(server.stderr.readline, "")
        url = next((line.split()[1] for line in lines if line.startswith("demo: ")), "")
        check(f"the demo of {folder.name} is at {url}", url)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        yield page
        others = [
            u
            for u in asked
            if not re.match(rf"(data:|blob:{url}|{url})", u.replace("localhost", "127.0.0.1"))
        ]
        check(f"{len(asked)} requests, none to another machine {others}", not others)
        page.close()
    finally:
        server.terminate()
        server.wait()


def provoke(page, label, value, expected):
    """An impossible value gives one toast that says what is possible, and the next request is served."""
    before = page.get_by_label(label, exact=True).first.input_value()
    page.get_by_label(label, exact=True).first.fill(value)
    page.get_by_role("button", name="Generate").click()
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text(expected, timeout=20000)
    check(f"a toast: {toast.inner_text().split(chr(10))[-1]!r}", toast.count() == 1)
    page.get_by_label(label, exact=True).first.fill(before)


def text(browser, folder, screenshots):
    with demo(browser, folder) as page:
        prompt, shown = page.locator("textarea").first, page.locator("textarea").nth(1)
        provoke(page, "prompt", "x = 1\n" * 1000, "the prompt has")
        page.screenshot(path=screenshots / "toast.png")
        page.get_by_test_id("toast-close").click()
        prompt.fill(PROMPT)
        page.get_by_role("button", name="Generate").click()
        seen, since = [""], time.monotonic()
        while time.monotonic() - since < 2:  # it grows no more
            whole = shown.input_value()
            if whole != seen[-1]:
                seen, since = [*seen, whole], time.monotonic()
        check(f"text came in {len(seen)} parts or more", whole.startswith(PROMPT) and len(seen) >= 4)
        page.screenshot(path=screenshots / "text.png")
        page.get_by_label("max_new_tokens").first.fill("2000")
        page.get_by_role("button", name="Generate").click()
        page.wait_for_timeout(1500)
        page.get_by_role("button", name="Stop").click()
        page.wait_for_timeout(1000)
        stopped = shown.input_value()
        page.wait_for_timeout(1500)
        check(f"stopped after {len(stopped)} characters", stopped == shown.input_value() != whole)
        check("without an error", page.get_by_text("Error", exact=True).count() == 0)
        plot = page.locator("canvas, svg.marks").first
        before = plot.screenshot()
        with (folder / "metrics.jsonl").open("a") as metrics:
            for step in range(10000, 11000, 10):
                metrics.write(json.dumps({"step": step, "train/loss": 3.0}) + "\n")
        page.wait_for_timeout(8000)
        check("the loss curve goes on with the run", before != plot.screenshot())
        page.get_by_role("button", name="settings").click()
        expect(page.get_by_text("learning_rate", exact=False).first).to_be_visible()
        page.screenshot(path=screenshots / "settings.png")


def pictures(browser, folder, screenshots):
    with demo(browser, folder) as page:
        provoke(page, "seed", "-5", "seed=-5")
        page.get_by_test_id("toast-close").click()
        page.get_by_label("class_label").first.click()
        page.get_by_role("option").nth(1).click()
        page.get_by_role("button", name="Generate").click()
        tiles = page.locator("button.thumbnail-item img, .grid-container img")
        expect(tiles).to_have_count(8, timeout=60000)
        check("eight pictures of one class", True)
        page.screenshot(path=screenshots / "pictures.png")
        tiles.first.click()
        with page.expect_download() as download:
            page.get_by_label("Download").first.click()
        head = Path(download.value.path()).read_bytes()[:8]
        check(f"one downloaded: {download.value.suggested_filename}", head == b"\x89PNG\r\n\x1a\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lm", type=Path)
    parser.add_argument("diffusion", type=Path)
    parser.add_argument("--screenshots", type=Path, default=Path("."))
    args = parser.parse_args()
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=QUIET)
        for scene, run in ((text, args.lm), (pictures, args.diffusion)):
            copy = Path(folder, "out", run.name)  # the curve is written on
            shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
            scene(browser, copy, args.screenshots)
        browser.close()


if __name__ == "__main__":
    main()
