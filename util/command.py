"""What all scripts share: the parser, types of flags, and one line instead of a traceback for what a user can fix."""

import argparse
import ast
import contextlib
import difflib
import functools
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import torch
import yaml

from util import distributed
from util.errors import InputError, NonFiniteLossError, StoppedError, first_line

# exit status of a run that a signal stopped and that can be resumed (EX_TEMPFAIL)
STOPPED = 75

# flags of other training scripts and what they are called here, where difflib would not find it by spelling
SYNONYMS = {
    "batch": "--batch-size",
    "cpu": "--device",
    "data": "--data-path",
    "data-dir": "--data-path",
    "ema-decay": "--model-ema-decay",
    "gpu": "--device",
    "image-size": "--input-size",
    "img-size": "--input-size",
    "learning-rate": "--lr",
    "name": "--model",
    "output": "--output_dir",
    "ra": "--repeated-aug",
    "test": "--eval",
    "wd": "--weight-decay",
}

# entries of args.json that a run with its flags does not take over: where it ran, and how it started
NOT_REPEATED = ("device", "config", "output_dir", "resume", "start_epoch", "given")
# flags whose default the machine chooses; args.json holds its choice
AUTO_FLAGS = ("amp", "dist_backend")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults where they are informative, and keep the line breaks of examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # 0 is informative; False, None and empty values are not
        shown = action.default or type(action.default) in (int, float)
        return super()._get_help_string(action) if shown else action.help


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes - and _ alike in flags and no abbreviations, and whose errors are InputErrors.

    The namespace has `given`, the destinations of the flags on the command line.
    """

    def __init__(self, **kwargs) -> None:
        # a prefix may be another script's flag: --test would be --test_speed here, and not --eval
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args, namespace=None):
        flags = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        words = []
        given = set()
        for word in args:
            name, equals, value = word.partition("=")
            flag = flags.get(name.replace("_", "-"))
            # a file may be called _h
            if flag and name.startswith("-"):
                word = flag + equals + value
                given.add(self._option_string_actions[flag].dest)
            words.append(word)
        namespace, rest = super().parse_known_args(words, namespace)
        namespace.given = given
        return namespace, rest

    def error(self, message: str):
        unknown = re.search(r"unrecognized arguments: ([^\s=]+)", message)
        if unknown is None:
            raise InputError(message.removeprefix("argument "))
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1, cutoff=0.8)
        synonym = SYNONYMS.get(unknown[1].lstrip("-").replace("_", "-"))
        # only if this script has that flag
        if synonym in self._option_string_actions:
            near = [synonym]
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        raise InputError(f"{unknown[1]}: no such flag; {hint}")


def number(kind: type, allowed: Callable[[float], bool], text: str) -> Callable[[str], float]:
    """Return a type for argparse: an int or a float, below 2^31 and `allowed`, which `text` describes."""

    def convert(word: str) -> float:
        try:
            value = kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is not {'a whole' if kind is int else 'a'} number") from None
        # larger numbers, infinity among them, overflow somewhere in the libraries
        if value >= 2**31 or not allowed(value):
            raise argparse.ArgumentTypeError(f"{word} must be {text}")
        return value

    return convert


positive_int = number(int, lambda v: v >= 1, "at least 1")
nonnegative_int = number(int, lambda v: v >= 0, "0 or more")
positive_float = number(float, lambda v: v > 0, "above 0")
nonnegative_float = number(float, lambda v: v >= 0, "0 or more")
fraction = number(float, lambda v: 0 <= v <= 1, "from 0 to 1")
open_fraction = number(float, lambda v: 0 < v <= 1, "above 0 and at most 1")
below_one = number(float, lambda v: 0 <= v < 1, "at least 0 and below 1")


def parse_key_values(words: Sequence[str], source: str) -> dict[str, Any]:
    """Return KEY=VALUE words as a dictionary; values are Python literals where they can be, or else strings.

    Raises InputError that names the flag `source`.
    """
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"{source} takes KEY=VALUE, not {word!r}")
        try:
            pairs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            # timm's ParseKwargs would leave the string "false", which counts as true
            pairs[key] = {"true": True, "false": False}.get(value.lower(), value)
    return pairs


class KeyValues(argparse.Action):
    """Store KEY=VALUE words as a dictionary; the flag given again adds to it, and without words empties it."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        before = getattr(namespace, self.dest) if values else None
        setattr(namespace, self.dest, (before or {}) | parse_key_values(values, option_string))


def parse_block_numbers(text: str) -> tuple[int, ...]:
    """Parse the block numbers of --drop_loc: "(3, 6, 9)", "[3, 6, 9]", "3,6,9" or "()"."""
    if not re.fullmatch(r"[\d,()\[\] ]*", text):
        raise argparse.ArgumentTypeError(f"{text} must be numbers of blocks, for example 3,6,9")
    return tuple(map(int, re.findall(r"\d+", text)))


@functools.cache
def import_file(path: str) -> str:
    """Execute a Python file, which registers models with timm, once, and return its path. Raises InputError."""
    # must not shadow an installed module
    name = f"imported_{Path(path).stem}"
    loader = SourceFileLoader(name, path)
    module = module_from_spec(spec_from_loader(name, loader))
    # timm looks up the module of a model
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        # of any kind: it is the user's code
        raise InputError(
            f"--import {path}: {type(error).__name__}: {first_line(error)}; correct the file or its path"
        ) from None
    return path


# keyword arguments of add_argument for kinds of flags that are not types
ACTIONS = {
    bool: {"action": "store_true"},
    KeyValues: {"action": KeyValues, "nargs": "*"},
    argparse.BooleanOptionalAction: {"action": argparse.BooleanOptionalAction},
}
# as default: the flag has none, and must be given
REQUIRED = argparse.SUPPRESS

IMPORT_FLAG = ("--import", import_file, None, "Python file to execute first, which registers your models with timm")
# what describes a model; each overrides what its checkpoint says
MODEL_FLAGS = (
    IMPORT_FLAG,
    ("--model", str, None, "any model of timm or of this repository"),
    ("--model-kwargs", KeyValues, None, "KEY=VALUE arguments of the model, for example embed_dim=96 depth=4"),
    (
        "--input-size",
        [positive_int],
        None,
        "pixels, or height and width; default: the checkpoint's, else the model's",
    ),
    ("--nb-classes", positive_int, None, "number of classes; default: the checkpoint's, else the data's"),
    ("--eval-crop-ratio", open_fraction, None, "share of the image's side that evaluation's center crop keeps"),
    ("--mean", [fraction] * 3, None, "mean of the pixels in red, green and blue, from 0 to 1"),
    ("--std", [open_fraction] * 3, None, "standard deviation of the pixels in red, green and blue"),
    ("--base_keep_rate", open_fraction, None, "EViT: share of the tokens that blocks of --drop_loc keep"),
    ("--fuse_token", argparse.BooleanOptionalAction, False, "EViT: fuse the other tokens into one"),
    ("--drop_loc", parse_block_numbers, None, "EViT: blocks that reorganise tokens, from 0, for example 3,6,9"),
)
CHECKPOINT_FLAGS = (
    ("--checkpoint", str, REQUIRED, "file or URL of a checkpoint of main.py, or a folder that export.py wrote"),
    ("--use-ema", bool, False, "use the checkpoint's EMA weights"),
)


def add_flags(group, rows: Sequence[tuple]) -> None:
    """Add flags to a parser or one of its groups; a row has the spellings, the type, the default and the help.

    The type bool makes a switch, BooleanOptionalAction a pair --X and --no-X; a tuple lists choices. [type] takes one
    or more values, [type] * n exactly n. A dictionary holds keyword arguments of add_argument.
    """
    for flags, kind, default, text in rows:
        if isinstance(kind, dict):
            kwargs = kind
        elif isinstance(kind, tuple):
            kwargs = {"choices": kind}
        elif isinstance(kind, list):
            kwargs = {"type": kind[0], "nargs": "+" if len(kind) == 1 else len(kind)}
        else:
            kwargs = ACTIONS.get(kind, {"type": kind})
        required = default is REQUIRED
        group.add_argument(*flags.split(), default=default, required=required, help=text, **kwargs)


def add_model_flags(parser: Parser) -> None:
    """Add the flags that name a checkpoint and describe its model to a script that loads it."""
    add_flags(parser, CHECKPOINT_FLAGS)
    add_flags(parser.add_argument_group("model: each flag overrides what the checkpoint says"), MODEL_FLAGS)


def parse_size(values: Sequence[int] | None) -> tuple[int, int] | None:
    """Return (height, width) of --input-size, None where it was not given. Raises InputError."""
    if values is None:
        return None
    if len(values) > 2:
        raise InputError(f"--input-size {' '.join(map(str, values))} must be one number, or height and width")
    return values[0], values[-1]


def to_words(name: str, value: Any, action: argparse.Action | None) -> list[str]:
    """Return a flag of a file as words of a command line. Raises InputError for a switch that is not true or false."""
    flag = f"--{name}"
    if action is None or value is None:
        # the parser refuses a flag that it does not know
        return [] if action else [flag]
    # switches
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"{flag}: {value!r} must be true or false")
        no = [f"--no-{name}"] if isinstance(action, argparse.BooleanOptionalAction) else []
        return [flag] if value else no
    if isinstance(value, dict):
        return [flag, *(f"{key}={item}" for key, item in value.items())]
    # block numbers are one word
    if isinstance(value, list) and action.nargs:
        return [flag, *map(str, value)]
    # YAML reads off as false
    return [f"{flag}={'off' if value is False else value}"]


def read_config(path: str, parser: Parser) -> list[str]:
    """Return the flags of a YAML or JSON file as words of a command line, checked as if they had been typed.

    From a run's args.json, only flags that were given, or whose default has changed since, are taken, and none of
    `NOT_REPEATED`. Raises InputError.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file) if path.endswith(".json") else yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--config {path}: unreadable ({reason}); give a YAML or JSON file of flags") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: must hold lines of FLAG: VALUE")
    if "versions" in content:
        # as JSON would store them
        defaults = json.loads(json.dumps(vars(parser.parse_args([])), default=str))
        given = content.get("given", ())
        content = {
            name: value
            for name, value in content.items()
            if name in given or (name in defaults and name not in AUTO_FLAGS and value != defaults[name])
        }
        for name in NOT_REPEATED:
            content.pop(name, None)

    # Parse the words here already, so that the error for a bad flag names the file
    actions = {flag.replace("_", "-"): action for flag, action in parser._option_string_actions.items()}
    try:
        words = []
        for name, value in content.items():
            words += to_words(name, value, actions.get(f"--{name}".replace("_", "-")))
        if parser.parse_args(words).config:
            raise InputError("--config: a file of flags cannot name another")
    except InputError as error:
        raise InputError(f"--config {path}: {error}") from None
    return words


def explain(error: BaseException) -> tuple[str, int]:
    """Return the line that explains what ended a script, "" if there is none to print, and the exit status."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, InputError):
        # the error of a loader's worker comes with its traceback in front
        return lines[-1].removeprefix("util.errors.InputError: "), 2
    if isinstance(error, NonFiniteLossError):
        return lines[-1], 1
    if isinstance(error, KeyboardInterrupt):
        return "stopped", 130
    # the reader of the output has ended, as in `predict.py … | head`
    if isinstance(error, BrokenPipeError):
        return "", 1
    if isinstance(error, OSError):
        name = error.filename or "the output"
        return f"{name}: {error.strerror or lines[0]}; check path, permissions and free space, or name another", 2
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        # some optimizers compile themselves
        return f"torch.compile: {lines[0]}; leave out --compile, or change --opt", 2
    if distributed.is_lost_connection(error):
        return "lost another process: see its own error, or it was silent for --dist-timeout seconds", 1
    if isinstance(error, torch.OutOfMemoryError):
        reason = lines[0].partition(". ")[0]
        return f"{reason}; lower --batch-size (--accum-steps makes up for it), or add --grad-checkpointing", 2
    # a bug
    traceback.print_exc()
    return "", 1


def run_command(name: str, command: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a script's `command` on its arguments and return the exit status.

    0; 1 for a diverged training, a lost process or a bug; 2 for what the user can fix; 75 for a run that a signal
    stopped and that can be resumed; 130 for Ctrl-C elsewhere.
    """
    try:
        status = command(list(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()
    except StoppedError as error:
        status = STOPPED
        # all processes stop at the same update
        if distributed.is_primary():
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    except (Exception, KeyboardInterrupt) as error:
        line, status = explain(error)
        if isinstance(error, OSError) and error.filename is None:
            # what stdout still holds would be a second error when Python exits
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        rank = f" [rank {distributed.rank()}]" if distributed.is_distributed() else ""
        if line:
            print(f"{name}: error{rank}: {line}", file=sys.stderr, flush=True)
    if distributed.is_distributed():
        # after an error at once: leaving the group waits for all processes
        if status not in (0, STOPPED):
            sys.stdout.flush()
            os._exit(status)
        distributed.shutdown()
    return status
