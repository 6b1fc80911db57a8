"""
Settings without a framework: the lowercase globals of a script are its settings.

    python train_lm.py configs/my_experiment.py --n_layer=8 --out_dir=out/wide

Config files (plain Python that assigns settings) and --name=value are applied from left to right; later wins. A
name that is no setting, or a value of another type than the default, ends the program with one line.
"""

import ast
import contextlib
import difflib
import math
import os
import re
import runpy
import sys
import types


def fail(message):
    """End the program for a mistake of its user: one line on stderr, exit code 2, no traceback."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the processes of a launch fail together: one speaks
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2) from ValueError(message)  # the demo goes on, and shows the cause


@contextlib.contextmanager
def named(setting, value):
    """Whatever a library raises while it loads what the user named becomes one line that quotes the setting."""
    try:
        yield
    except Exception as error:
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        fail(f"{setting}={value!r} cannot be used: {reason.splitlines()[0]}")


def nearest(word, candidates):
    return difflib.get_close_matches(word, list(candidates), n=1, cutoff=0)[0]


def settings(namespace):
    """{name: value} of the settings in a module's globals: lowercase scalars without a leading underscore."""
    kinds = (bool, int, float, str)
    return {k: v for k, v in namespace.items() if k == k.lower() and k[0] != "_" and type(v) in kinds}


def parse(text, default):
    """The text after `--name=` as Python reads it, but true and false in any case; a string stays as it is."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text.title() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError):
        return text  # of the wrong type, which configure() reports


def read_config(path, values):
    """{name: value} that a config file sets; the file sees the values so far."""
    with named("config", path):
        namespace = runpy.run_path(path, init_globals=dict(values))
    return {k: v for k, v in namespace.items() if k[0] != "_" and not isinstance(v, types.ModuleType)}


def print_help(namespace):
    with open(namespace["__file__"], encoding="utf-8") as f:
        comments = dict(re.findall(r"^([a-z]\w*) = .*?  # (.*)$", f.read(), re.MULTILINE))
    print((namespace["__doc__"] or "").strip() + "\n\nSettings (--name=value, or in a config file):\n")
    for name, value in settings(namespace).items():
        print(f"  --{name}={value!r}".ljust(36), comments.get(name, ""))


def configure(namespace, arguments=None):
    """Override the settings in `namespace` (a script's globals()) by the command line, or end the program."""
    values = settings(namespace)
    for argument in sys.argv[1:] if arguments is None else arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if argument in ("--help", "-h"):
            raise SystemExit(print_help(namespace))
        if argument.endswith(".py") and not equals:
            changes = read_config(argument, values)
        elif argument.startswith("--") and equals:
            changes = {name: parse(text, values.get(name))}
        else:
            fail(f"{argument}: write --name=value, or name a config file (.py)")
        for name, value in changes.items():
            if name not in values:
                fail(f"{argument}: {name} is no setting; did you mean {nearest(name, values)}?")
            kind = type(values[name])
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind or value in (math.inf, -math.inf):
                fail(f"{argument}: {name} must be of type {kind.__name__}, like {values[name]!r}")
            values[name] = value
    namespace.update({k: os.path.expanduser(v) if type(v) is str else v for k, v in values.items()})
