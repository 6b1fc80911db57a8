"""
Settings: precedence, types, legal values; every mistake is one line and exit code 2; whatever is passed, there is no
traceback and nothing is accepted silently (hypothesis).
"""

import re
import types

import pytest
from conftest import run
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configurator import configure, settings

SCRIPT = '''"""What it does."""
name = "a"  # a string
mode = "fast"  # how ("fast" | "slow")
count = 3  # a number (1..)
rate = 0.5  # a fraction (0..<1)
flag = False  # a switch
'''
DEFAULTS = {"name": "a", "mode": "fast", "count": 3, "rate": 0.5, "flag": False}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The globals of a script with these settings, as configure() gets them; config files are looked up in tmp_path."""
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    namespace = {"__file__": "script.py"}
    exec(SCRIPT, namespace)
    return namespace


def test_later_wins_and_types_follow_the_default(script, tmp_path):
    (tmp_path / "one.py").write_text(
        "import math\ncount = 4\nrate = 0\n_half = count / 2\nname = f'n{_half}'\n"
    )
    (tmp_path / "two.py").write_text("count = count + 1\n")
    configure(script, ["one.py", "--flag=true", "--count=7", "two.py", "--rate=1e-3", "--name=x=y.py"])
    assert settings(script) == {"name": "x=y.py", "mode": "fast", "count": 8, "rate": 0.001, "flag": True}
    assert type(script["rate"]) is float


MISTAKES = [
    (["--cuont=3"], "did you mean --count"),
    (["--count", "3"], "--count=3"),
    (["--flag"], "--flag=False"),
    (["-count=3"], "--count=3"),
    (["count=3"], "--count=3"),
    (["--count=3.5"], "whole number"),
    (["--count=1e3"], "whole number"),
    (["--rate=fast"], "a number"),
    (["--rate=nan"], "out of range"),
    (["--count=99999999999999999999"], "out of range"),
    (["--flag=yes"], "True or False"),
    (["--count=0"], "at least 1"),
    (["--rate=1"], "below 1"),
    (["--rate=-0.1"], "at least 0"),
    (["--mode=fats"], "did you mean 'fast'"),
    (["missing.py"], "no config file"),
    (["config/base.py"], "did you mean configs/base.py"),
    (["bad_name.py"], "lerning is no setting"),
    (["bad_type.py"], "must be of type int"),
    (["bad_bool.py"], "must be of type int"),
    (["raises.py"], "line 2: ZeroDivisionError"),
    (["syntax.py"], "line 1: SyntaxError"),
    (["exits.py"], "SystemExit"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=lambda x: str(x))
def test_a_mistake_is_one_line(script, tmp_path, capsys, arguments, message):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text("")
    (tmp_path / "bad_name.py").write_text("lerning = 1")
    (tmp_path / "bad_type.py").write_text("count = '3'")
    (tmp_path / "bad_bool.py").write_text("count = True")
    (tmp_path / "raises.py").write_text("_a = 1\ncount = 1 / 0")
    (tmp_path / "syntax.py").write_text("count = = 3")
    (tmp_path / "exits.py").write_text("raise SystemExit")
    with pytest.raises(SystemExit) as stop:
        configure(script, arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and message in err, err
    assert settings(script) == DEFAULTS  # nothing was changed


@pytest.mark.parametrize("name", ["train_lm.py", "train_diffusion.py", "sample.py"])
def test_help_lists_every_setting_with_its_default_and_comment(name):
    import importlib

    module = importlib.import_module(name[:-3])
    out, _ = run(name, "--help")
    for key, value in settings(vars(module)).items():
        line = re.search(rf"^  --{key}=(.*)$", out, re.MULTILINE)
        assert line and line[1].startswith(repr(value)) and len(line[1].split()) > 2, key


def legal(values):
    """Of the right types, and within what the comments of SCRIPT allow."""
    assert [type(v) for v in values.values()] == [type(v) for v in DEFAULTS.values()]
    assert values["mode"] in ("fast", "slow") and values["count"] >= 1 and 0 <= values["rate"] < 1


def means(text, value):
    """Whether a text says this value, by Python's own reading of it."""
    return text == value or text.strip().lower() == str(value).lower() or float(text) == value


names = st.sampled_from([*DEFAULTS, "counts", "Rate", "fl ag", "_count", ""])
values = st.one_of(
    st.sampled_from(
        ["true", "FALSE", "1", "0.5", "1e9", "-1", "nan", "inf", "1_0", "0x1", "fast", "slow", " 3 ", "\x00"]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8),
)
said = st.builds(
    lambda dashes, name, equals, value: dashes + name + equals + value,
    st.sampled_from(["--", "-", "", "---"]),
    names,
    st.sampled_from(["=", "", " ", "=="]),
    values,
)
arguments = st.lists(
    st.one_of(st.builds("--{}={}".format, names, values), said, st.text(max_size=8)), max_size=3
)


@hypothesis_settings(max_examples=8000, deadline=None)
@given(arguments)
def test_any_arguments_are_applied_or_refused(arguments):
    namespace = types.SimpleNamespace(**DEFAULTS, __file__=__file__, __doc__="").__dict__
    try:
        configure(namespace, arguments)
    except SystemExit as stop:
        assert stop.code == 2 or {"--help", "-h"} & set(arguments)
        assert settings(namespace) == DEFAULTS
    else:
        legal(settings(namespace))
        last = dict(
            argument[2:].split("=", 1) for argument in arguments
        )  # what is no --name=value is refused
        assert last.keys() <= DEFAULTS.keys()
        for name, value in settings(namespace).items():
            assert means(last[name], value) if name in last else value == DEFAULTS[name]


literals = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
).map(repr)
expressions = st.sampled_from(
    ["1 / 0", "count + 1", "rate / 2", "open", "exit()", "=", "lambda: 0", "'slow'", "input"]
)
lines = st.builds(
    "{} = {}".format, st.sampled_from([*DEFAULTS, "counts", "_a"]), st.one_of(literals, expressions)
)
files = st.lists(
    st.one_of(
        lines, st.sampled_from(["import math", "def f(): pass", "raise KeyError", "\x00", "del count"])
    ),
    max_size=3,
)


@hypothesis_settings(max_examples=2500, deadline=None)
@given(files)
def test_any_config_file_is_applied_or_refused(tmp_path_factory, files):
    path = tmp_path_factory.getbasetemp() / "fuzzed.py"
    path.write_text("\n".join(files), encoding="utf-8")
    namespace = types.SimpleNamespace(**DEFAULTS, __file__=__file__, __doc__="").__dict__
    try:
        configure(namespace, [str(path)])
    except SystemExit as stop:
        assert stop.code == 2 and settings(namespace) == DEFAULTS
    else:
        legal(settings(namespace))
        plain = dict(DEFAULTS, nan=float("nan"), inf=float("inf"))
        exec("\n".join(files), plain)  # what is applied is what Python makes of the file
        assert settings(namespace) == {name: plain.get(name, value) for name, value in DEFAULTS.items()}
