"""
Settings: the later one wins, types follow the defaults, ~ is expanded in paths alone; every mistake is one line and
exit code 2, in every process; a config file that fails shows its own traceback; whatever is passed is applied or
refused, never anything else (hypothesis); --help lists every setting with its comment.
"""

import importlib
import re
from pathlib import Path

import pytest
from conftest import ROOT, within
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configurator import UserError, comments, configure, fail, named, settings

DEFAULTS = {"name": "a", "folder": "b", "count": 3, "rate": 0.5, "flag": False}
FILES = {
    "one": "import math\ncount = 4\nrate = 0\n_half = count / 2\nname = f'n{_half}'\n",
    "two": "count = count + 1\n",
    "bad_name": "lerning = 1",
    "bad_bool": "count = True",
    "raises": "_a = 1\ncount = 1 / 0",
    "syntax": "count = = 3",
}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The globals of a script with these settings, in a folder with config files."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    return {**DEFAULTS, "PATHS": ("folder",)}


def test_later_wins_types_follow_the_default_and_a_tilde_is_home_in_paths_alone(script):
    arguments = ["one.py", "--flag=true", "--count=7", "two.py", "--rate=1e-3", "--name=~/x=y.py"]
    configure(script, [*arguments, "--folder=~/runs"])
    expected = {"name": "~/x=y.py", "folder": str(Path.home() / "runs"), "count": 8, "rate": 0.001}
    assert settings(script) == expected | {"flag": True}
    configure(script, ["--rate=2"])
    assert type(script["rate"]) is float


MISTAKES = {
    "--cuont=3": "did you mean count",
    "--count": "--count: write --name=value",
    "--count=3.5": "of type int, like 3",
    "--rate=1e999": "a finite number",
    "--flag=yes": "of type bool, like False",
    "missing.py": "there is no config file missing.py",
    "bad_name.py": "lerning is not a setting",
    "bad_bool.py": "of type int",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_is_one_line(script, monkeypatch, capsys, argument):
    monkeypatch.setenv("LOCAL_RANK", "1")  # every process that fails says why
    with pytest.raises(UserError) as stop:
        configure(script, [argument])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1
    assert MISTAKES[argument] in err
    assert stop.value.message in err
    assert settings(script) == DEFAULTS  # nothing was changed


@pytest.mark.parametrize("name, error", [("raises", ZeroDivisionError), ("syntax", SyntaxError)])
def test_a_config_file_that_fails_shows_its_own_traceback(script, name, error):
    with pytest.raises(error) as stop:
        configure(script, [f"{name}.py"])
    place = stop.value.filename if error is SyntaxError else stop.traceback[-1].path
    assert str(place).endswith(f"{name}.py")


def test_named_passes_on_the_whole_reason_on_one_line(capsys):
    with pytest.raises(UserError), named("dataset", "mine"):
        raise OSError("first line\n  second line") from ValueError("the cause")
    err = capsys.readouterr().err
    assert err.endswith("dataset='mine' cannot be used: first line second line the cause\n")
    with pytest.raises(UserError), named("dataset", "mine"):
        raise KeyError
    assert "cannot be used: KeyError" in capsys.readouterr().err
    with pytest.raises(UserError) as stop, named("dataset", "mine"):
        fail("a sentence of our own")  # is not wrapped in another one
    assert stop.value.message == "a sentence of our own"


@pytest.mark.parametrize("name", ["train_lm.py", "train_diffusion.py", "sample.py"])
def test_help_lists_every_setting_with_its_default_and_comment(name):
    out, _ = within(name, "--help")
    for key, value in settings(vars(importlib.import_module(name[:-3]))).items():
        line = re.search(rf"^  --{key}=(.*)$", out, re.MULTILINE)
        assert line, key
        assert line[1].startswith(repr(value))
        assert line[1].endswith(comments(ROOT / name)[key])


names = st.sampled_from([*DEFAULTS, "counts", "Rate", "fl ag", "_count", ""])
values = st.sampled_from(["true", "FALSE", "1", "0.5", "1e9", "-1", "nan", "inf", "1_0", "0x1", " 3 ", "[1]"])
values |= st.integers().map(str) | st.floats().map(str) | st.text(max_size=8)


@hypothesis_settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.lists(st.builds("--{}={}".format, names, values) | st.text(max_size=8), max_size=3))
def test_any_arguments_are_applied_or_refused(arguments):
    namespace = {**DEFAULTS, "__file__": __file__, "__doc__": ""}
    try:
        configure(namespace, arguments)
    except SystemExit as stop:
        assert stop.code == 2 or {"--help", "-h"} & set(arguments)
        assert settings(namespace) == DEFAULTS
    else:
        for name, value in settings(namespace).items():
            assert type(value) is type(DEFAULTS[name])
        said = dict(argument[2:].split("=", 1) for argument in arguments)  # all else is refused
        assert said.keys() <= DEFAULTS.keys()
        for name, value in settings(namespace).items():
            text = said.get(name, str(DEFAULTS[name]))
            assert text == value or text.lower() == str(value).lower() or type(value)(eval(text)) == value
