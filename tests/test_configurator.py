"""
Settings: precedence, types; every mistake is one line and exit code 2; whatever is passed, there is no
traceback and nothing is accepted silently (hypothesis); --help lists every setting with its comment.
"""

import importlib
import re
import types
from pathlib import Path

import pytest
from conftest import within
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configurator import configure, settings

DEFAULTS = {"name": "a", "count": 3, "rate": 0.5, "flag": False}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The globals of a script with these settings; config files are looked up in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return dict(DEFAULTS)


def test_later_wins_and_types_follow_the_default(script, tmp_path):
    one = "import math\ncount = 4\nrate = 0\n_half = count / 2\nname = f'n{_half}'\n"
    (tmp_path / "one.py").write_text(one)
    (tmp_path / "two.py").write_text("count = count + 1\n")
    configure(script, ["one.py", "--flag=true", "--count=7", "two.py", "--rate=1e-3", "--name=x=y.py"])
    assert settings(script) == {"name": "x=y.py", "count": 8, "rate": 0.001, "flag": True}
    configure(script, ["--rate=2"])
    assert type(script["rate"]) is float
    configure(script, ["--name=~/runs"])  # which a shell leaves as it is
    assert script["name"] == str(Path.home() / "runs")


FILES = {"bad_name": "lerning = 1", "bad_type": "count = '3'", "bad_bool": "count = True"}
FILES |= {"raises": "_a = 1\ncount = 1 / 0", "syntax": "count = = 3"}
MISTAKES = {
    "--cuont=3": "did you mean count",
    "--count": "write --name=value",
    "-count=3": "write --name=value",
    "count=3": "write --name=value",
    "--count=3.5": "of type int, like 3",
    "--rate=fast": "of type float, like 0.5",
    "--rate=nan": "of type float",
    "--rate=1e999": "of type float",
    "--flag=yes": "of type bool, like False",
    "missing.py": "config='missing.py' cannot be used",
    "bad_name.py": "lerning is no setting",
    "bad_type.py": "of type int",
    "bad_bool.py": "of type int",
    "raises.py": "division by zero",
    "syntax.py": "invalid syntax",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_is_one_line(script, tmp_path, capsys, argument):
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(SystemExit) as stop:
        configure(script, [argument])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and MISTAKES[argument] in err, err
    assert settings(script) == DEFAULTS  # nothing was changed


@pytest.mark.parametrize("name", ["train_lm.py", "train_diffusion.py", "sample.py"])
def test_help_lists_every_setting_with_its_default_and_comment(name):
    out, _ = within(name, "--help")
    for key, value in settings(vars(importlib.import_module(name[:-3]))).items():
        line = re.search(rf"^  --{key}=(.*)$", out, re.MULTILINE)
        assert line and line[1].startswith(repr(value)) and len(line[1].split()) > 2, key


names = st.sampled_from([*DEFAULTS, "counts", "Rate", "fl ag", "_count", ""])
values = st.sampled_from(["true", "FALSE", "1", "0.5", "1e9", "-1", "nan", "inf", "1_0", "0x1", " 3 ", "[1]"])
values |= st.integers().map(str) | st.floats().map(str) | st.text(max_size=8)


@hypothesis_settings(max_examples=1000, deadline=None)
@given(st.lists(st.builds("--{}={}".format, names, values) | st.text(max_size=8), max_size=3))
def test_any_arguments_are_applied_or_refused(arguments):
    namespace = types.SimpleNamespace(**DEFAULTS, __file__=__file__, __doc__="").__dict__
    try:
        configure(namespace, arguments)
    except SystemExit as stop:
        assert stop.code == 2 or {"--help", "-h"} & set(arguments)
        assert settings(namespace) == DEFAULTS
    else:
        assert [type(v) for v in settings(namespace).values()] == [type(v) for v in DEFAULTS.values()]
        said = dict(argument[2:].split("=", 1) for argument in arguments)  # all else is refused
        assert said.keys() <= DEFAULTS.keys()
        for name, value in settings(namespace).items():
            text = said.get(name, str(DEFAULTS[name]))
            assert text == value or text.lower() == str(value).lower() or eval(text) == value
