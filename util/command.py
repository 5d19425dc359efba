"""What all scripts share: the parser, types of flags, and one line instead of a traceback for what a user can fix."""

import argparse
import ast
import contextlib
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from util import distributed
from util.errors import InputError, NonFiniteLossError, StoppedError

# exit status of a run that a signal stopped and that can be resumed (EX_TEMPFAIL)
STOPPED = 75

# flags of other training scripts, and what they are called here, where the spelling does not tell
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
    "pretrained": "--finetune",
    "ra": "--repeated-aug",
    "test": "--eval",
    "wd": "--weight-decay",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the defaults that say something, and keep the line breaks of examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


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
        # another script's flag would be no help
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
    """Parse the block numbers of --drop_loc: "(3, 6, 9)", "3,6,9" or "()"."""
    if not re.fullmatch(r"[\d,() ]*", text):
        raise argparse.ArgumentTypeError(f"{text} must be numbers of blocks, for example 3,6,9")
    return tuple(map(int, re.findall(r"\d+", text)))


# what argparse takes for kinds of flags that are no types
ACTIONS = {
    bool: {"action": "store_true"},
    KeyValues: {"action": KeyValues, "nargs": "*"},
    argparse.BooleanOptionalAction: {"action": argparse.BooleanOptionalAction},
}
# as default: the flag has none, and must be given
REQUIRED = argparse.SUPPRESS

# what describes a model; each overrides what its checkpoint says
MODEL_FLAGS = (
    ("--model", str, None, "any model of timm or of this repository"),
    ("--model-kwargs", KeyValues, None, "KEY=VALUE arguments of the model, for example embed_dim=96 depth=4"),
    ("--input-size", [positive_int], None, "pixels, or height and width; default: the model's own"),
    ("--nb-classes", positive_int, None, "number of classes; default: from the data"),
    ("--eval-crop-ratio", open_fraction, None, "share of the image that evaluation's center crop keeps"),
    ("--base_keep_rate", open_fraction, None, "EViT: share of the tokens that blocks of --drop_loc keep"),
    ("--fuse_token", bool, False, "EViT: fuse the other tokens into one"),
    ("--drop_loc", parse_block_numbers, None, "EViT: blocks that reorganise tokens, from 0, for example 3,6,9"),
)
CHECKPOINT_FLAGS = (
    ("--checkpoint", str, REQUIRED, "file or URL of a checkpoint of main.py, or a folder that export.py wrote"),
    ("--use-ema", bool, False, "use the checkpoint's EMA weights"),
)


def add_flags(group, rows: Sequence[tuple]) -> None:
    """Add flags to a parser or one of its groups; a row has the spellings, the type, the default and the help.

    The type bool makes a switch, BooleanOptionalAction a pair --X and --no-X; a tuple lists choices, and a type in
    brackets takes several values.
    """
    for flags, kind, default, text in rows:
        if isinstance(kind, tuple):
            kwargs = {"choices": kind}
        elif isinstance(kind, list):
            kwargs = {"type": kind[0], "nargs": "+"}
        else:
            kwargs = ACTIONS.get(kind, {"type": kind})
        required = default is REQUIRED
        group.add_argument(*flags.split(), default=default, required=required, help=text, **kwargs)


def add_model_flags(parser: Parser) -> None:
    """Add the flags that name a checkpoint and describe its model to a script that loads it."""
    add_flags(parser, CHECKPOINT_FLAGS)
    add_flags(parser.add_argument_group("model, where the checkpoint does not describe it"), MODEL_FLAGS)


def parse_size(values: Sequence[int] | None) -> tuple[int, int] | None:
    """Return (height, width) of --input-size, None where it was not given. Raises InputError."""
    if values is None:
        return None
    if len(values) > 2:
        raise InputError(f"--input-size {' '.join(map(str, values))} must be one number, or height and width")
    return values[0], values[-1]


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
        return f"{name}: {error.strerror or lines[0]}; free space, or name another file or folder", 2
    if type(error).__module__.startswith("torch._dynamo"):
        return f"--compile: {lines[0]}; leave it out", 2
    if distributed.is_lost_connection(error):
        return "lost another process: it has ended and said why, or is silent (--dist-timeout)", 1
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
