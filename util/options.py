"""The command line of main.py: flags, checks that need nothing but flags, and the configurations made of them."""

import argparse
import re
from argparse import BooleanOptionalAction
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from util.command import (
    MODEL_FLAGS,
    KeyValues,
    Parser,
    add_flags,
    below_one,
    fraction,
    nonnegative_float,
    nonnegative_int,
    open_fraction,
    parse_size,
    positive_float,
    positive_int,
    read_config,
)
from util.config import DEFAULT_DROP_PATH, ModelConfig, is_evit, resolve_input_size
from util.data_options import AUGMENT_FLAGS, DATA_FLAGS, NO_EFFECT, is_mixup_active, pretrained_fields
from util.errors import InputError
from util.keep_rate import keep_rate_at
from util.precision import AMP_FLAG

# timm's except plateau: to resume, the learning rate must be a function of the epoch alone
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")
VISUALIZATIONS = ("mask", "attention", "head_tokens", "matrix", "rollout", "distance")
# flags that only models with token reorganisation can follow
EVIT_FLAGS = ("base_keep_rate", "fuse_token", "drop_loc", "shrink_start_epoch", "shrink_epochs", "visualize_mask")

EXAMPLES = """examples:
  python main.py --model dhvt_tiny_imagenet_patch16 --data-set FOLDER --data-path DATA --output_dir OUT --resume auto
  python main.py --eval --resume OUT/best_checkpoint.pth
  python main.py --only_test_speed --model dhvt_tiny_cifar_patch4
"""


# groups of flags: spellings, type, default and help, see add_flags
FLAGS = {
    "run": (
        ("--config -c", str, None, "YAML or JSON file of flags, or a run's args.json; the command line overrides it"),
        ("--batch-size", positive_int, 64, "batch size per process"),
        ("--epochs", positive_int, 300, "number of epochs to train"),
        ("--accum-steps", positive_int, 1, "gradient accumulation: batches per update"),
        ("--output_dir", str, "", "folder for checkpoints, logs and curves; nothing is saved without it"),
        ("--resume", str, "", "checkpoint to continue, evaluate or visualize; auto: the newest in --output_dir"),
        ("--start_epoch", nonnegative_int, 0, "first epoch, for a checkpoint that does not hold its own"),
        ("--checkpoint-interval", positive_float, None, "save within epochs too, every so many minutes"),
        ("--keep-checkpoints", positive_int, 2, "number of latest epochs whose checkpoints are kept"),
        ("--log-wandb", str, "", "also log to this project of Weights & Biases (requirements-extra.txt)"),
        ("--save-images", bool, False, "draw the first training batch, as the model sees it, to train_images.png"),
        ("--eval", bool, False, "evaluate the checkpoint of --resume and exit"),
        ("--report", str, None, "with --eval: folder for metrics, confusion matrix, predictions and worst mistakes"),
        ("--use-ema", bool, False, "with --eval, --finetune and --visualize: use the EMA weights"),
        ("--eval-freq", positive_int, 1, "evaluate every so many epochs, and after the last"),
        ("--print-freq", positive_int, 10, "updates between two lines of progress"),
        ("--test_speed", bool, False, "measure throughput and MACs first, then go on"),
        ("--only_test_speed", bool, False, "measure throughput and MACs and exit; needs no data"),
        ("--device", str, None, "for example cuda, cuda:1 or cpu; default: the best there is"),
        ("--seed", nonnegative_int, 0, "seed of weights, order of images and augmentation"),
        ("--deterministic", bool, False, "use deterministic algorithms, so that runs repeat exactly; slower on GPUs"),
    ),
    "speed and memory": (
        AMP_FLAG,
        ("--tf32", bool, False, "compute float32 matrix products of CUDA devices in TensorFloat-32"),
        ("--compile", bool, False, "torch.compile: minutes at the start, faster afterwards"),
        (
            "--torchcompile-mode",
            ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
            "default",
            "with --compile: what torch.compile optimizes for",
        ),
        ("--channels-last", bool, False, "channels-last memory format, for convolutional models"),
        ("--grad-checkpointing", bool, False, "recompute activations in the backward pass: less memory"),
        ("--speed-batch-size", positive_int, None, "for --test_speed and --only_test_speed; default: --batch-size"),
    ),
    "token reorganisation, dropout and EMA": (
        ("--shrink_start_epoch", nonnegative_int, 10, "EViT: all tokens are kept before this epoch"),
        ("--shrink_epochs", nonnegative_int, 0, "EViT: number of epochs over which the keep rate falls"),
        ("--drop", below_one, 0.0, "dropout rate after the embedding and inside the blocks"),
        ("--drop-path", below_one, DEFAULT_DROP_PATH, "maximum stochastic depth rate; rises linearly over the blocks"),
        ("--model-ema", BooleanOptionalAction, True, "keep and evaluate an EMA of the weights"),
        ("--model-ema-decay", fraction, 0.99996, "decay of the EMA per update"),
        ("--model-ema-warmup", bool, False, "raise the EMA's decay from 0 to --model-ema-decay, as timm does"),
        ("--model-ema-force-cpu", bool, False, "keep the EMA on the CPU"),
    ),
    "fine-tuning": (
        ("--pretrained", bool, False, "start from timm's weights for the model; with --eval and --visualize, use them"),
        ("--finetune", str, "", "checkpoint to start from; a head of another shape is re-initialised"),
        ("--freeze", str, "", "head: train only the classifier; N: train only the last N blocks, norm and head"),
        ("--layer-decay", open_fraction, None, "layer-wise learning rate decay, for example 0.75"),
        ("--train-mode", BooleanOptionalAction, True, "--no-train-mode: eval mode (batch norms frozen), as published"),
    ),
    "optimization": (
        ("--opt", str, "adamw", "any optimizer of timm"),
        ("--opt-eps", nonnegative_float, 1e-8, "epsilon of the optimizer"),
        ("--opt-betas", [below_one], None, "betas of the optimizer; default: the optimizer's"),
        ("--opt-kwargs", KeyValues, {}, "other KEY=VALUE arguments of the optimizer, for example amsgrad=true"),
        ("--momentum", below_one, 0.9, "momentum of SGD and similar optimizers"),
        ("--weight-decay", nonnegative_float, 0.05, "weight decay"),
        ("--clip-grad", positive_float, None, "clip gradients to this norm; default: no clipping"),
        (
            "--lr",
            positive_float,
            5e-4,
            "learning rate for an effective batch size of 512; multiplied by batch / 512 unless --unscale-lr",
        ),
        ("--unscale-lr", bool, False, "use --lr as it is"),
        ("--sched", SCHEDULES, "cosine", "learning rate schedule"),
        ("--lr-noise", [fraction], None, "shares of the epochs between which the learning rate is noisy"),
        ("--lr-noise-pct", positive_float, 0.67, "limit of the learning rate noise, as a share of the learning rate"),
        ("--lr-noise-std", nonnegative_float, 1.0, "standard deviation of the learning rate noise"),
        ("--warmup-lr", nonnegative_float, 1e-6, "learning rate at the start of the warm-up"),
        ("--min-lr", nonnegative_float, 1e-5, "learning rate at the end of cosine, tanh, poly, wsd and rsqrt"),
        ("--decay-epochs", positive_float, 30, "step: period of decay; multistep: its epoch; wsd, rsqrt: its length"),
        ("--warmup-epochs", nonnegative_int, 5, "epochs of warm-up"),
        # of the schedule plateau
        ("--cooldown-epochs", int, 10, NO_EFFECT),
        ("--patience-epochs", int, 10, NO_EFFECT),
        ("--decay-rate --dr", positive_float, 0.1, "decay factor (step, multistep), exponent (poly)"),
        ("--bce-loss", bool, False, "binary cross-entropy; every target above 0 becomes 1"),
        ("--class-weights", ("none", "balanced"), "none", "balanced: rare classes weigh more in the training loss"),
    ),
    "augmentation": AUGMENT_FLAGS,
    "data": DATA_FLAGS,
    "distillation": (
        ("--teacher-model", str, "regnety_160", "timm model of the teacher, if its checkpoint does not name it"),
        ("--teacher-path", str, "", "checkpoint of the teacher"),
        ("--distillation-type", ("none", "soft", "hard"), "none", "how the teacher trains a distillation head"),
        ("--kd", bool, False, "distil the teacher's logits into the only head of any model, as timm does"),
        ("--distillation-alpha", fraction, 0.5, "weight of the distillation loss"),
        ("--distillation-tau", positive_float, 1.0, "temperature of soft distillation and --kd"),
    ),
    "pictures of what a checkpoint looks at": (
        ("--visualize", VISUALIZATIONS, None, "write pictures of a kind and exit; docs/paper.md explains the kinds"),
        ("--visualize_mask", bool, False, "the same as --visualize mask: which patches EViT keeps"),
        ("--visualize_attention", bool, False, "the same as --visualize attention: where the class token looks"),
        ("--n_visualization", positive_int, 128, "number of images, with --visualize"),
        ("--image-dir", str, None, "images without labels, instead of the validation set"),
        ("--blocks", [positive_int], None, "blocks to show, from 1; default: the paper's, the last (rollout) or all"),
        ("--format", ("png", "pdf"), "png", "format of the figures"),
        ("--npz", bool, False, "also write the numbers that a figure shows, to a .npz of its name"),
    ),
    "distribution": (
        ("--dist-backend", str, None, "default: nccl on CUDA, gloo on the CPU"),
        ("--dist-timeout", positive_float, 600.0, "seconds to wait for a silent process"),
        # evaluation is always distributed, and exact; the rest comes from the launcher
        ("--dist-eval", bool, False, NO_EFFECT),
        ("--world_size", int, 1, NO_EFFECT),
        ("--dist_url", str, "env://", NO_EFFECT),
        ("--local_rank", int, 0, NO_EFFECT),
    ),
}


def build_parser() -> Parser:
    """Return the parser of main.py; the published flags keep their spelling, type and default."""
    parser = Parser(
        prog="main.py",
        description="Train and evaluate DHVT, EViT and any timm model on images.",
        epilog=EXAMPLES,
    )
    add_flags(parser.add_argument_group("model"), MODEL_FLAGS)
    # for a new model; a loaded checkpoint is overridden only by flags on the command line
    parser.set_defaults(
        model="deit_base_patch16_224",
        model_kwargs={},
        eval_crop_ratio=ModelConfig.crop_ratio,
        base_keep_rate=0.7,
        fuse_token=False,
        drop_loc="(3, 6, 9)",
        mean=ModelConfig.mean,
        std=ModelConfig.std,
    )
    for title, rows in FLAGS.items():
        add_flags(parser.add_argument_group(title), rows)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and check a command line. Raises InputError."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.config:
        # later words win
        args = parser.parse_args([*read_config(args.config, parser), *argv])
    check_values(args)
    check_modes(args)
    if trains(args):
        check_training(args)
        check_distillation(args)
    # a checkpoint may be of another model than --model
    if not is_evit(args.model) and not args.resume:
        for name in EVIT_FLAGS:
            if name in args.given:
                raise InputError(f"--{name} is for EViT, which --model {args.model} is not: leave it out")
    return args


def trains(args: argparse.Namespace) -> bool:
    """Return whether the flags ask for training: not for an evaluation, pictures or a speed test alone."""
    return not (args.eval or args.only_test_speed or visualization_mode(args))


def visualization_mode(args: argparse.Namespace) -> str:
    """Return which of VISUALIZATIONS is asked for, "" if none."""
    if args.visualize_mask:
        return "mask"
    return "attention" if args.visualize_attention else args.visualize or ""


def distillation_kind(args: argparse.Namespace) -> str:
    """Return what DistillationLoss calls the kind of distillation, "none" without one."""
    return "kd" if args.kd else args.distillation_type


def check_values(args: argparse.Namespace) -> None:
    """Raise InputError for values that parse, but that cannot be used."""
    parse_size(args.input_size)
    # torch names no flag, and notices a third beta in the first update only
    betas = 3 if "adan" in args.opt.lower() else 2
    if args.opt_betas is not None and len(args.opt_betas) != betas:
        raise InputError(f"--opt-betas {' '.join(map(str, args.opt_betas))}: --opt {args.opt} takes {betas}")
    # timm does not compare the two
    minmax = args.cutmix_minmax
    if minmax is not None and (len(minmax) != 2 or minmax[0] >= minmax[1]):
        raise InputError(f"--cutmix-minmax {' '.join(map(str, minmax))}: give a minimum and a larger maximum")
    for name in ("scale", "ratio"):
        bounds = getattr(args, name)
        if bounds is not None and bounds[0] > bounds[1]:
            raise InputError(f"--{name} {bounds[0]:g} {bounds[1]:g}: give the minimum first")
    if not re.fullmatch(r"head|\d*", args.freeze):
        raise InputError(f"--freeze {args.freeze}: give head, or the number of blocks to train")
    # only their flags also reach the transforms, the classes and the keep rate schedule
    flags = {
        "pretrained": "--pretrained",
        "img_size": "--input-size",
        "num_classes": "--nb-classes",
        "base_keep_rate": "--base_keep_rate",
        "fuse_token": "--fuse_token",
        "drop_loc": "--drop_loc",
    }
    for name in flags.keys() & args.model_kwargs.keys():
        raise InputError(f"--model-kwargs {name}={args.model_kwargs[name]}: use {flags[name]}")
    if "torchcompile_mode" in args.given and not args.compile:
        raise InputError("--torchcompile-mode is for --compile: add it")
    # pytorch#169545
    if args.accum_steps > 1 and args.torchcompile_mode in ("reduce-overhead", "max-autotune"):
        raise InputError(
            f"--torchcompile-mode {args.torchcompile_mode}: its CUDA graphs overwrite the gradients that --accum-steps "
            "adds up; use max-autotune-no-cudagraphs, or leave --accum-steps out"
        )


def check_modes(args: argparse.Namespace) -> None:
    """Raise InputError for flags that contradict each other, that need another, or that would do nothing."""
    # what is done instead of training
    mode = visualization_mode(args)
    modes = ("eval", "only_test_speed", "visualize", "visualize_mask", "visualize_attention")
    active = [f"--{name}" for name in modes if getattr(args, name)]
    # speed may be measured before an evaluation, pictures are made alone
    if mode and len(active) > 1:
        raise InputError(f"{' and '.join(active)}: give one at a time")
    # timm's own weights need no file
    if (args.eval or mode) and not args.resume and not args.pretrained:
        raise InputError(f"{active[0]} needs a checkpoint: add --resume FILE, or --pretrained for timm's weights")

    # flags without effect in this mode
    if args.use_ema and not (args.eval or args.finetune or mode):
        raise InputError("--use-ema is for --eval, --finetune and --visualize: leave it out")
    if args.report and not args.eval:
        raise InputError("--report is for --eval: add it")
    if "split" in args.given and not (args.eval or mode):
        raise InputError("--split is for --eval and --visualize: leave it out")
    for name in ("image_dir", "blocks", "format", "npz"):
        if name in args.given and not mode:
            raise InputError(f"--{name.replace('_', '-')} is for --visualize KIND: add it")
    if args.resume == "auto" and not args.output_dir:
        raise InputError("--resume auto looks into --output_dir: give one")
    if args.compile and args.grad_checkpointing:
        raise InputError("--compile and --grad-checkpointing: give one; the compiler itself chooses what to recompute")


def check_training(args: argparse.Namespace) -> None:
    """Raise InputError for flags of training that contradict each other."""
    for flag, value in {"--log-wandb": args.log_wandb, "--save-images": args.save_images}.items():
        if value and not args.output_dir:
            raise InputError(f"{flag} writes to --output_dir: give one")
    mixup = is_mixup_active(args)
    crops = [name for name in ("src", "crop", "scale", "ratio") if name in args.given]
    if len(crops) > 1 and (args.src or args.crop in ("pad", "squash")):
        raise InputError(f"--{' and --'.join(crops)}: give one crop; --scale and --ratio are of --crop rrc")
    # timm mixes the images of a batch in pairs
    if mixup and args.batch_size % 2:
        raise InputError(f"--batch-size {args.batch_size} must be even for mixup and cutmix (or --mixup 0 --cutmix 0)")
    # smoothed targets are all above 0, and so become 1; without mixup they are not smoothed
    if args.bce_loss and args.smoothing and (mixup or "smoothing" in args.given):
        raise InputError("--bce-loss makes 1 of every target above 0, smoothed ones too: add --smoothing 0")
    if args.src and not args.ThreeAugment:
        raise InputError("--src is the crop of --ThreeAugment: add it")
    if args.mixup_off_epoch and not mixup:
        raise InputError(f"--mixup-off-epoch {args.mixup_off_epoch}: mixup and cutmix are off; leave it out")
    if args.model_ema_warmup and not args.model_ema:
        raise InputError("--model-ema-warmup is for the EMA, which --no-model-ema leaves out: give one")
    if args.resume in ("", "auto") and args.start_epoch >= args.epochs:
        raise InputError(f"--start_epoch {args.start_epoch} must be below --epochs {args.epochs}")


def check_distillation(args: argparse.Namespace) -> None:
    """Raise InputError for flags of distillation that contradict each other."""
    distilled = args.distillation_type != "none"
    flag = f"--distillation-type {args.distillation_type}" if distilled else "--kd"
    if args.kd and distilled:
        raise InputError(f"--kd and {flag}: give one")
    if (args.kd or distilled) and not args.teacher_path:
        raise InputError(f"{flag} needs --teacher-path FILE")
    if args.teacher_path and not (args.kd or distilled):
        raise InputError("--teacher-path is for --distillation-type and --kd: add one")
    if distilled and not args.train_mode:
        raise InputError("--no-train-mode averages the two heads that distillation trains apart: leave it out")


def model_config(args: argparse.Namespace) -> ModelConfig:
    """Return the model that the flags describe; the number of classes may still come from the data."""
    kwargs: dict[str, Any] = {"drop_path_rate": args.drop_path}
    # after the embedding and inside the blocks, as published; timm's drop_rate would be the classifier's
    if args.drop:
        kwargs["pos_drop_rate"] = args.drop
        kwargs["proj_drop_rate"] = args.drop
    if is_evit(args.model):
        kwargs["base_keep_rate"] = args.base_keep_rate
        kwargs["fuse_token"] = args.fuse_token
        kwargs["drop_loc"] = args.drop_loc
    if args.pretrained:
        kwargs["pretrained"] = True
    # evaluation shows as much of an image as training does
    whole = args.crop in ("pad", "squash") and "eval_crop_ratio" not in args.given
    config = ModelConfig(
        name=args.model,
        num_classes=args.nb_classes,
        input_size=resolve_input_size(args.model, parse_size(args.input_size)),
        kwargs=kwargs | args.model_kwargs,
        crop_ratio=1.0 if whole else args.eval_crop_ratio,
        crop_mode="squash" if args.crop == "squash" else "center",
        mean=args.mean,
        std=args.std,
    )
    return replace(config, **pretrained_fields(args)) if args.pretrained else config


def model_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of `add_model_flags` that were given, as keyword arguments of `load_trained`."""
    flags = {
        "name": "model",
        "kwargs": "model_kwargs",
        "num_classes": "nb_classes",
        "crop_ratio": "eval_crop_ratio",
        "mean": "mean",
        "std": "std",
        "base_keep_rate": "base_keep_rate",
        "fuse_token": "fuse_token",
        "drop_loc": "drop_loc",
    }
    overrides = {name: getattr(args, flag) for name, flag in flags.items() if flag in args.given}
    if args.input_size:
        overrides["input_size"] = parse_size(args.input_size)
    return overrides


def keep_rate_schedule(args: argparse.Namespace, updates_per_epoch: int) -> Callable[[int], float] | None:
    """Return a function from the update, counted over all epochs, to EViT's keep rate; None for other models."""
    if not is_evit(args.model):
        return None
    return partial(
        keep_rate_at,
        start_epoch=args.shrink_start_epoch,
        end_epoch=args.shrink_start_epoch + args.shrink_epochs,
        updates_per_epoch=updates_per_epoch,
        base_rate=args.base_keep_rate,
    )


def scale_lr(args: argparse.Namespace, processes: int) -> tuple[float, str]:
    """Return the learning rate after linear scaling by the effective batch size, and the calculation."""
    batch = args.batch_size * processes * args.accum_steps
    lr = args.lr if args.unscale_lr else args.lr * batch / 512
    rule = "--lr (--unscale-lr)" if args.unscale_lr else f"{args.lr:g} x {batch} / 512"
    lr_info = (
        f"effective batch size {batch} = {args.batch_size} per process x {processes} processes x {args.accum_steps} "
        f"accumulated; learning rate {lr:g} = {rule}"
    )
    return lr, lr_info
