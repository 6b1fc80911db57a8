"""
Validates the tree: ruff is content, the README tells the true line counts, CI runs its command, and settings
of the same name stand in the same order in both trainers.
"""

import importlib
import re

import pytest
from conftest import ROOT, run, within

import train_diffusion
import train_lm
from configurator import comments, settings


@pytest.mark.parametrize("how", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(how):
    run("-m", "ruff", *how, ".")


def test_the_readme_tells_the_true_line_counts_and_what_ci_runs():
    readme = (ROOT / "README.md").read_text()
    for name, lines in re.findall(r"^\| (\w+\.py) \| (\d+) \|", readme, re.MULTILINE):
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name
    command = re.search(r"^ +(.*&& pytest)$", readme, re.MULTILINE)[1]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_gpu_runner_says_loudly_that_there_is_none():
    _, err = within("tests/gpu/run.py", code=1)
    assert "NO GPU WAS FOUND" in err


@pytest.mark.parametrize("script", ["train_lm", "train_diffusion", "sample"])
def test_every_setting_is_explained(script):
    module = importlib.import_module(script)
    assert settings(vars(module)).keys() <= comments(module.__file__).keys()


def test_settings_of_the_same_name_stand_in_the_same_order():
    lm = list(settings(vars(train_lm)))
    diffusion = list(settings(vars(train_diffusion)))
    shared = [name for name in lm if name in diffusion]
    assert shared == [name for name in diffusion if name in lm]
    assert len(shared) > 35
