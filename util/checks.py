"""Checks of a command line that need nothing but its flags, and what flags mean together."""

import argparse
import math
import re
from collections.abc import Callable

import timm

from util.errors import InputError

DOMAIN_NET = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
FOLDERS = ("FOLDER", "IMNET", *DOMAIN_NET)  # train/CLASS/ and val/CLASS/, or LMDB
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")
REORGANISING = ("base_keep_rate", "fuse_token", "drop_loc", "shrink_start_epoch", "shrink_epochs", "visualize_mask")

Rule = tuple[str, Callable[[float], bool], str]

RULES: tuple[Rule, ...] = (
    ("batch_size", lambda v: v >= 1, "at least 1"),
    ("epochs", lambda v: v >= 1, "at least 1"),
    ("accum_steps", lambda v: v >= 1, "at least 1"),
    ("start_epoch", lambda v: v >= 0, "0 or more"),
    ("keep_checkpoints", lambda v: v >= 1, "at least 1"),
    ("checkpoint_interval", lambda v: v > 0, "above 0"),
    ("dist_timeout", lambda v: v > 0, "above 0"),
    ("eval_freq", lambda v: v >= 1, "at least 1"),
    ("print_freq", lambda v: v >= 1, "at least 1"),
    ("seed", lambda v: 0 <= v < 2**31, "from 0 to 2147483647"),
    ("nb_classes", lambda v: v >= 1, "at least 1"),
    ("drop", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("drop_path", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("model_ema_decay", lambda v: 0 <= v <= 1, "from 0 to 1"),
    ("opt_eps", lambda v: v >= 0, "0 or more"),
    ("momentum", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("weight_decay", lambda v: v >= 0, "0 or more"),
    ("clip_grad", lambda v: v > 0, "above 0"),
    ("lr", lambda v: v > 0, "above 0"),
    ("warmup_lr", lambda v: v >= 0, "0 or more"),
    ("min_lr", lambda v: v >= 0, "0 or more"),
    ("decay_epochs", lambda v: v > 0, "above 0"),
    ("warmup_epochs", lambda v: v >= 0, "0 or more"),
    ("decay_rate", lambda v: v > 0, "above 0"),
    ("color_jitter", lambda v: v >= 0, "0 or more"),
    ("smoothing", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("reprob", lambda v: 0 <= v <= 1, "from 0 to 1"),
    ("recount", lambda v: v >= 1, "at least 1"),
    ("mixup", lambda v: v >= 0, "0 or more"),
    ("cutmix", lambda v: v >= 0, "0 or more"),
    ("mixup_prob", lambda v: 0 <= v <= 1, "from 0 to 1"),
    ("mixup_switch_prob", lambda v: 0 <= v <= 1, "from 0 to 1"),
    ("eval_crop_ratio", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("num_workers", lambda v: v >= 0, "0 or more"),
    ("speed_batch_size", lambda v: v >= 1, "at least 1"),
    ("layer_decay", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("distillation_alpha", lambda v: 0 <= v <= 1, "from 0 to 1"),
    ("distillation_tau", lambda v: v > 0, "above 0"),
    ("base_keep_rate", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("shrink_start_epoch", lambda v: v >= 0, "0 or more"),
    ("shrink_epochs", lambda v: v >= 0, "0 or more"),
    ("n_visualization", lambda v: v >= 1, "at least 1"),
)


def mixup_active(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def find_drop_loc(text: str) -> tuple[int, ...]:
    """Read block numbers from "(3, 6, 9)" or "3,6,9"."""
    inner = re.fullmatch(r"\s*(?:\(([^()]*)\)|\[([^\[\]]*)\]|([^()\[\]]*))\s*", text)
    words = next((g for g in inner.groups() if g is not None), "").split(",") if inner else [text]
    if words[-1].strip() == "":  # "(3,)" and "()"
        words.pop()
    if not all(re.fullmatch(r"\s*\d+\s*", word) for word in words):
        raise InputError(f"--drop_loc {text} must be numbers of blocks, such as 3,6,9")
    return tuple(map(int, words))


def find_pictures(args: argparse.Namespace) -> str:
    """Say which pictures are asked for: mask, attention or none ("")."""
    return "mask" if args.visualize_mask else "attention" if args.visualize_attention else ""


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse values that cannot work, naming flag, value and what is allowed."""
    flags = {a.dest: a.option_strings[0] for a in parser._actions if a.option_strings and a.const is not False}
    for dest, allowed, text in RULES:
        value = getattr(args, dest)
        if value is not None and not (math.isfinite(value) and allowed(value)):
            raise InputError(f"{flags[dest]} {value if isinstance(value, int) else f'{value:g}'} must be {text}")
    for dest, flag in ((d, f) for d, f in flags.items() if hasattr(args, d)):
        values = getattr(args, dest) if isinstance(getattr(args, dest), list) else [getattr(args, dest)]
        if any(isinstance(v, int) and abs(v) >= 2**31 for v in values):
            raise InputError(f"{flag} {str(values[0])[:40]} is no such number: give one below {2**31}")
    if args.sched not in SCHEDULES:
        extra = " (it depends on the accuracy, so it cannot be resumed)" if args.sched == "plateau" else ""
        raise InputError(f"--sched {args.sched} is not offered{extra}: choose from {', '.join(SCHEDULES)}")
    if args.input_size is not None and (len(args.input_size) > 2 or min(args.input_size) < 1):
        raise InputError(f"--input-size {' '.join(map(str, args.input_size))} must be one number or height and width")
    betas = 3 if "adan" in args.opt.lower() else 2
    if args.lr_noise is not None and not (len(args.lr_noise) <= 2 and all(0 <= v <= 1 for v in args.lr_noise)):
        given = " ".join(map(str, args.lr_noise))
        raise InputError(f"--lr-noise {given} must be one or two fractions of the epochs, from 0 to 1")
    if args.opt_betas is not None and not (len(args.opt_betas) == betas and all(0 <= b < 1 for b in args.opt_betas)):
        given = " ".join(map(str, args.opt_betas))
        raise InputError(f"--opt-betas {given} must be {betas} numbers for --opt {args.opt}, at least 0 and below 1")
    if args.cutmix_minmax is not None and not (
        len(args.cutmix_minmax) == 2 and 0 <= args.cutmix_minmax[0] < args.cutmix_minmax[1] <= 1
    ):
        raise InputError(f"--cutmix-minmax {' '.join(map(str, args.cutmix_minmax))} must be two numbers from 0 to 1")
    _check_together(args, parser)


def _check_together(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    pictures = find_pictures(args)
    if not (args.eval or args.only_test_speed or pictures):
        _check_training(args)
    _check_reorganisation(args, parser)
    _check_pictures(args)
    _check_speed(args)
    built = {"img_size": "--input-size", "num_classes": "--nb-classes"}
    for name, flag in (built | {name: f"--{name}" for name in ("base_keep_rate", "fuse_token", "drop_loc")}).items():
        if name in args.model_kwargs:
            raise InputError(f"--model-kwargs {name}={args.model_kwargs[name]}: give {flag}, which others follow too")
    if (args.eval or pictures) and not args.resume and not args.model_kwargs.get("pretrained"):
        mode = f"--visualize_{pictures}" if pictures else "--eval"
        raise InputError(f"{mode} needs the checkpoint to {'show' if pictures else 'evaluate'}: add --resume FILE")
    if args.use_ema and not (args.eval or args.finetune or pictures):
        raise InputError("--use-ema is for --eval, --finetune and pictures: add one of them, or leave it out")
    if args.resume == "auto" and not args.output_dir:
        raise InputError("--resume auto looks in --output_dir: give one")
    if args.use_lmdb and args.data_set not in FOLDERS:
        raise InputError(
            f"--use-lmdb is for data sets in folders, and --data-set {args.data_set} is none: leave it out"
        )
    if args.data_set != "DIGITS" and not args.data_path and not args.only_test_speed and not args.image_dir:
        layout = ", with train/CLASS/ and val/CLASS/ in it" if args.data_set in FOLDERS else ""
        raise InputError(
            f"--data-set {args.data_set} needs --data-path FOLDER{layout}" + (", or --image-dir" if pictures else "")
        )


def _check_reorganisation(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    find_drop_loc(args.drop_loc)
    able = timm.list_models("*_shrink_base")
    for action in parser._actions if args.model not in able else ():
        if action.dest in REORGANISING and getattr(args, action.dest) != action.default:
            raise InputError(
                f"{action.option_strings[0]} is for models that reorganise tokens, and --model {args.model} does not: "
                f"take {', '.join(able)}"
            )


def _check_pictures(args: argparse.Namespace) -> None:
    modes = {"--visualize_mask": args.visualize_mask, "--visualize_attention": args.visualize_attention}
    given = [
        flag for flag, on in (modes | {"--eval": args.eval, "--only_test_speed": args.only_test_speed}).items() if on
    ]
    if find_pictures(args) and len(given) > 1:
        raise InputError(f"{' and '.join(given)} do one thing each: give one at a time")
    if args.image_dir and not find_pictures(args):
        raise InputError("--image-dir is for --visualize_mask and --visualize_attention: add one, or leave it out")


def _check_speed(args: argparse.Namespace) -> None:
    if args.compile and args.grad_checkpointing:
        raise InputError(
            "--grad-checkpointing and --compile: give one; the compiler chooses itself what to compute again"
        )
    if args.speed_batch_size and not (args.test_speed or args.only_test_speed):
        raise InputError("--speed-batch-size is for --test_speed and --only_test_speed: add one, or leave it out")


def _check_training(args: argparse.Namespace) -> None:
    if mixup_active(args) and args.batch_size % 2:
        raise InputError(f"--batch-size {args.batch_size} must be even for mixup and cutmix (or --mixup 0 --cutmix 0)")
    if mixup_active(args) and args.bce_loss and args.smoothing:
        raise InputError(
            f"--bce-loss makes every target above 0 a 1, which --smoothing {args.smoothing:g} makes all of them: "
            "add --smoothing 0"
        )
    if args.distillation_type != "none" and not args.teacher_path:
        raise InputError(
            f"--distillation-type {args.distillation_type} needs a teacher's weights: add --teacher-path FILE"
        )
    if args.distillation_type != "none" and not args.train_mode:
        raise InputError(
            f"--no-train-mode averages the two heads, which --distillation-type {args.distillation_type} trains "
            "apart: leave it out"
        )
    if args.freeze != "head" and args.freeze and not args.freeze.isdecimal():
        raise InputError(f"--freeze {args.freeze} must be head or a number of blocks to train")
    if not args.resume and args.start_epoch >= args.epochs:
        raise InputError(f"--start_epoch {args.start_epoch} leaves nothing to do of --epochs {args.epochs}: lower it")
