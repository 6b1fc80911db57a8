"""
Settings without a framework: the lowercase global variables of a script are its settings.

    python train_lm.py configs/my_experiment.py --n_layer=8 --out_dir=out/wide

Config files (plain Python that assigns settings) and --name=value arguments are applied from left to right,
so the later one wins. An unknown name, or a value of the wrong type, ends the program with one sentence.
In settings that a script lists in PATHS, ~ means the home directory.
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
from pathlib import Path


class UserError(SystemExit):
    """A mistake of the user: ends the program with exit code 2, unless somebody catches it."""

    def __init__(self, message):
        super().__init__(2)
        self.message = message


def fail(message):
    """End the program because of a mistake of its user, with one line on stderr instead of a traceback."""
    message = " ".join(message.split())  # messages of libraries may have several lines
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    raise UserError(message)


@contextlib.contextmanager
def named(setting, value):
    """Report any exception inside the block as a bad value of the setting, in one sentence.

    Only calls of libraries belong inside, so that a mistake in our own code keeps its traceback.
    """
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        cause = error.__cause__  # often the real reason
        if cause and str(cause) not in reason:
            reason += f" {cause}"
        fail(f"{setting}={value!r} cannot be used: {reason}")


def settings(namespace):
    """Return {name: value} of the settings among a script's globals: lowercase names of plain values."""
    found = {}
    for name, value in namespace.items():
        is_lowercase = name.islower() and name[0] != "_"
        if is_lowercase and type(value) in (bool, int, float, str):
            found[name] = value
    return found


def comments(path):
    """Return {name: comment} for the settings in a script. --help and the demo show these comments."""
    # A line such as: top_k = 0  # keep only the k most likely tokens
    setting = r"^([a-z]\w*) = .*?  # (.*)$"
    script = Path(path).read_text(encoding="utf-8")
    return dict(re.findall(setting, script, re.MULTILINE))


def sections(path, *titles):
    """Return the sections of a script, as text, whose headings ("# ---- ...") begin with one of titles."""
    parts = Path(path).read_text(encoding="utf-8").split("\n# ---- ")
    return [part for part in parts if part.startswith(titles)]


def print_help(namespace):
    """Print the script's docstring and its settings with their defaults and comments."""
    described = comments(namespace["__file__"])
    print((namespace["__doc__"] or "").strip())
    print("\nSettings (--name=value, or in a config file):\n")
    for name, value in settings(namespace).items():
        print(f"  --{name}={value!r}".ljust(36), described.get(name, ""))


def parse(text, default):
    """Return the text after `--name=` as a value. If the default is a string, it stays as it is."""
    if isinstance(default, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)  # reads numbers, and runs no code
    except (ValueError, TypeError, SyntaxError):
        return text  # not a number: configure() reports that its type is wrong


def read_config(path, values):
    """Run a config file, which can read and assign settings. Return {name: value} as it leaves them."""
    if not os.path.isfile(path):
        fail(f"there is no config file {path}")
    namespace = runpy.run_path(path, init_globals=dict(values))
    assigned = {}
    for name, value in namespace.items():
        # A config may import modules, and use names such as _n for itself.
        if name[0] != "_" and not isinstance(value, types.ModuleType):
            assigned[name] = value
    return assigned


def configure(namespace, arguments=None):
    """Override the settings in `namespace`, a script's globals(), by config files and the command line."""
    values = settings(namespace)
    if arguments is None:
        arguments = sys.argv[1:]
    # From left to right, so that a later argument overrides an earlier one
    for argument in arguments:
        if argument in ("--help", "-h"):
            print_help(namespace)
            sys.exit()
        elif argument.startswith("--") and "=" in argument:
            setting, _, text = argument.removeprefix("--").partition("=")
            changes = {setting: parse(text, values.get(setting))}
        elif argument.endswith(".py"):
            changes = read_config(argument, values)
        else:
            fail(f"{argument}: write --name=value, such as --resume=True, or name a config file (.py)")

        # The checks are the same for both kinds of arguments.
        for name, value in changes.items():
            if name not in values:
                # With cutoff=0, there always is a nearest name.
                [nearest] = difflib.get_close_matches(name, values, n=1, cutoff=0)
                fail(f"{argument}: {name} is not a setting; did you mean {nearest}?")
            kind = type(values[name])
            # Take 1 for 1.0. float() would raise an error for numbers of 2**1024 and more.
            if kind is float and type(value) is int and abs(value) < 2**1000:
                value = float(value)
            if type(value) is not kind:
                fail(f"{argument}: {name} must be of type {kind.__name__}, like {values[name]!r}")
            if kind is float and not math.isfinite(value):
                fail(f"{argument}: {name} must be a finite number")
            if name in namespace.get("PATHS", ()):  # the shell leaves the ~ in --out_dir=~/runs as it is
                value = os.path.expanduser(value)
            values[name] = value
    namespace.update(values)
