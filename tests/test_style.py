"""The tree: ruff is content, every config is legal, the README tells the true line counts and CI runs its command."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, run


@pytest.mark.parametrize("how", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(how):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *how, "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_readme_tells_the_true_line_counts():
    readme = (ROOT / "README.md").read_text()
    for name, lines in re.findall(r"^\| (\w+\.py) \| (\d+) \|", readme, re.MULTILINE):
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name


def test_ci_runs_the_command_of_the_readme():
    command = next(
        line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.endswith("&& pytest")
    )
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_every_config_is_legal(tmp_path, path):
    """It gets as far as the data, which is not there."""
    _, err = run(
        "train_lm.py", path, f"--dataset={tmp_path}/none.txt", f"--out_dir={tmp_path / 'run'}", code=2
    )
    assert "there is no file or folder" in err


def test_the_gpu_runner_says_loudly_that_there_is_none():
    _, err = run("tests/gpu/run.py", "--shakespeare=none", code=1)
    assert "NO GPU WAS FOUND" in err
