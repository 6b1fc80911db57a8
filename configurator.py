"""
Settings without a framework: the lowercase globals of a script are its settings.

    python train_lm.py configs/my_experiment.py --n_layer=8 --out_dir=out/wide

Config files (plain Python that assigns settings) and --key=value are applied from left to right; later wins.
A name that is no setting, or a value of another type than the default, stops the program with one line.
"""

import difflib
import glob
import math
import os
import re
import runpy
import sys
import types


def fail(message):
    """End the program for a mistake of its user: one line on stderr, exit code 2, no traceback."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a launch fail together: one speaks
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2) from ValueError(message)  # the demo goes on, and shows it


def reason(error):
    """The first line of what an error says, or if it says nothing, its kind."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def nearest(word, candidates):
    """The candidate that looks most like `word`, however far that is."""
    return max(candidates, key=lambda c: difflib.SequenceMatcher(None, word, c).ratio(), default="")


def settings(namespace):
    """{name: value} of the settings in a module's globals: lowercase scalars without a leading underscore."""
    return {
        k: v
        for k, v in namespace.items()
        if k == k.lower() and k[0] != "_" and type(v) in (bool, int, float, str)
    }


def checked(name, value, default, source):
    """`value` in the type of the default (an int widens to a float), or an error that says so."""
    kind = type(default)
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not kind:
        got = (repr(value) if isinstance(value, str) else str(value))[:100]
        fail(f"{source}: {name} must be of type {kind.__name__}, like {default!r}, not {got}")
    if (kind is float and not math.isfinite(value)) or (kind is int and abs(value) >= 2**63):
        fail(f"{source}: {name} is out of range: {value}")
    return value


def parsed(name, text, default):
    """The text after `--name=` as a value of the default's type."""
    kind = type(default)
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        example = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
        fail(f"--{name}={text}: write {example}, as in --{name}={default}")
    return checked(name, value, default, f"--{name}={text}")


def read_config(path, values):
    """{name: value} that a config file sets; the file sees the values so far."""
    if not os.path.isfile(path):
        found = glob.glob("configs/**/*.py", recursive=True)
        fail(
            f"there is no config file {path!r}" + (f"; did you mean {nearest(path, found)}?" if found else "")
        )
    try:
        namespace = runpy.run_path(path, init_globals=dict(values))
    except (Exception, SystemExit) as error:  # whatever it raises is its author's mistake, not ours
        trace, lines = error.__traceback__, [getattr(error, "lineno", None)]
        while trace:
            lines += [trace.tb_lineno] if trace.tb_frame.f_code.co_filename == path else []
            trace = trace.tb_next
        fail(f"{path}, line {lines[-1]}: {type(error).__name__}: {error}")
    changed = {}
    for name, value in namespace.items():
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue  # a scratch name or an import
        if name not in values:
            near = nearest(name, values)
            fail(f"{path}: {name} is no setting; did you mean {near}? (start scratch names with _)")
        changed[name] = checked(name, value, values[name], path)
    return changed


def comments(namespace):
    """{name: the comment that stands behind the setting in its script}."""
    with open(namespace["__file__"], encoding="utf-8") as f:
        return dict(re.findall(r"^([a-z]\w*) = .*?  # (.*)$", f.read(), re.MULTILINE))


def check_legal(name, value, comment):
    """A comment may end in legal values, as (1..), (0..<1) or ("a" | "b"); without, no number is negative."""
    if choices := re.search(r'\(("[^"]*"(?: \| "[^"]*")+)\)$', comment):
        choices = re.findall(r'"([^"]*)"', choices[1])
        if value not in choices:
            near = nearest(value, choices)
            fail(f"{name}={value!r} is none of {', '.join(map(repr, choices))}; did you mean {near!r}?")
    if type(value) in (int, float):
        bounds = re.search(r"\((-?\d+)\.\.(<?)(\d*)\)$", comment)
        low, below, high = bounds.groups() if bounds else ("0", "", "")
        if value < float(low) or (high and (value > float(high) or (below and value == float(high)))):
            bound = f" and {'below' if below else 'at most'} {high}" if high else ""
            fail(f"{name}={value} must be at least {low}{bound}")


def configure(namespace, arguments=None):
    """Override the settings in `namespace` (a script's globals()) by the command line, or end the program."""
    values, notes = settings(namespace), comments(namespace)
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        print((namespace["__doc__"] or "").strip() + "\n\nSettings (--name=value, or in a config file):\n")
        for name, value in values.items():
            print(f"  --{name}={value!r}".ljust(36), notes.get(name, ""))
        raise SystemExit(0)
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        name, equals, text = argument.lstrip("-").partition("=")
        if argument.endswith(".py") and not argument.startswith("-") and not equals:
            values |= read_config(argument, values)
        elif name not in values:
            near = nearest(name, values)
            fail(f"{argument}: no such setting or config file (.py); did you mean --{near}={values[near]}?")
        elif not re.match(r"--[^-]", argument) or not equals:
            value = text or (values[name] if following.startswith("--") else following)
            fail(f"{argument}: write it in one word, --{name}={value}")
        else:
            values[name] = parsed(name, text, values[name])
    for name, value in values.items():
        check_legal(name, value, notes.get(name, ""))
    namespace.update(values)
