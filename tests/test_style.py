"""
The tree: ruff is content, the README tells the true line counts, CI runs its command, and what the two trainers repeat
is the same in both.
"""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run


@pytest.mark.parametrize("how", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(how):
    command = [sys.executable, "-m", "ruff", *how, "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_readme_tells_the_true_line_counts_and_what_ci_runs():
    readme = (ROOT / "README.md").read_text()
    for name, lines in re.findall(r"^\| (\w+\.py) \| (\d+) \|", readme, re.MULTILINE):
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name
    command = re.search(r"^ +(.*&& pytest)$", readme, re.MULTILINE)[1]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_gpu_runner_says_loudly_that_there_is_none():
    _, err = run("tests/gpu/run.py", "--shakespeare=none", code=1)
    assert "NO GPU WAS FOUND" in err


def test_settings_of_the_same_name_stand_in_the_same_order():
    names = [
        re.findall(r"^([a-z]\w*) = .*  # ", (ROOT / f"train_{kind}.py").read_text(), re.MULTILINE)
        for kind in ("lm", "diffusion")
    ]
    lm, diffusion = ([name for name in one if name in other] for one, other in (names, names[::-1]))
    assert lm == diffusion and len(lm) > 35


def test_what_both_trainers_do_alike_stands_in_both_in_the_same_words():
    def definitions(name):
        body = ast.parse((ROOT / name).read_text()).body
        return {node.name: ast.unparse(node) for node in body if hasattr(node, "name")}

    lm, diffusion = definitions("train_lm.py"), definitions("train_diffusion.py")
    twins = "norm Muon lr_at gather open_run_dir catch_signals finish start_accelerator"
    for name in twins.split():
        assert lm[name] == diffusion[name], name
    assert len(lm.keys() & diffusion.keys()) > 20
