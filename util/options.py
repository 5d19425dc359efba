"""The command line: flags and defaults."""

import argparse
import ast
from collections.abc import Sequence
from typing import Any

from util.checks import FOLDERS, SCHEDULES, check, find_pictures
from util.errors import InputError
from util.parser import Parser

DATA_SETS = ("DIGITS", *FOLDERS, "CIFAR", "CIFAR-10", "INAT", "INAT19")
RANKS = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
NO_EFFECT = {
    "resplit": "as in the published scripts",
    "dist_eval": "evaluation is always sharded, and exact",
    "world_size": "the launcher says it",
    "dist_url": "the launcher says it",
    "local_rank": "the launcher says it",
    "cooldown_epochs": "training lasts exactly --epochs",
    "patience_epochs": "the plateau schedule is not offered",
}

TEACHING = ("teacher_model", "teacher_path", "distillation_alpha", "distillation_tau")


def read_pairs(words: Sequence[str], source: str) -> dict[str, Any]:
    """Read `key=value` words, each value as a Python literal where it is one; errors name `source`."""
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"{source} takes key=value, not {word!r}")
        try:
            pairs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[key] = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    return pairs


class KeyValues(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, read_pairs(values, option_string))


def _switch(group, name: str, default: bool, text: str) -> None:
    dest = name.replace("-", "_")
    group.add_argument(f"--{name}", dest=dest, action="store_true", default=default, help=text)
    group.add_argument(f"--no-{name}", dest=dest, action="store_false", default=default, help=f"not --{name}")


def build_parser() -> Parser:
    """Build the parser of main.py; the published flags keep their spelling, type and default."""
    parser = Parser(
        prog="main.py",
        description="Train and evaluate DHVT and any timm model on images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    groups = (_add_run, _add_speed, _add_model, _add_finetuning, _add_optimization, _add_augmentation, _add_data)
    for add in (*groups, _add_distillation, _add_reorganisation, _add_pictures, _add_distribution):
        add(parser)
    return parser


def _add_run(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--batch-size", default=64, type=int, help="images a process and step")
    add("--epochs", default=300, type=int)
    add("--accum-steps", default=1, type=int, help="batches to sum up before a step of the optimizer")
    add("--output_dir", default="", help="folder for checkpoints, logs and curves; nothing is written without it")
    add(
        "--resume", default="", metavar="FILE|URL|auto", help="continue a run; auto: the newest in --output_dir, if any"
    )
    add("--start_epoch", default=0, type=int, help="for a checkpoint that does not say its epoch")
    add(
        "--checkpoint-interval", default=None, type=float, metavar="MINUTES",
        help="a checkpoint every so often within an epoch too, besides those at its end and at a signal",
    )  # fmt: skip
    add("--keep-checkpoints", default=2, type=int, help="how many of the last epochs' checkpoints to keep")
    add("--eval", action="store_true", help="evaluate the --resume checkpoint and stop")
    add("--use-ema", action="store_true", help="with --eval or --finetune: the checkpoint's EMA weights")
    add("--eval-freq", default=1, type=int, help="evaluate every so many epochs, and after the last")
    add("--print-freq", default=10, type=int, help="steps between reports")
    add("--test_speed", action="store_true", help="measure throughput and MACs, then go on")
    add("--only_test_speed", action="store_true", help="measure throughput and MACs, then stop; needs no data")
    add("--device", default=None, help="cuda, cuda:1, cpu, …; default: the best there is")
    add("--seed", default=0, type=int)
    add("--deterministic", action="store_true", help="the same numbers in each run, on GPUs too; slower there")


def _add_speed(parser: Parser) -> None:
    add = parser.add_argument_group("speed and memory").add_argument
    add("--amp", default="auto", choices=("auto", "off", "fp16", "bf16"), help="mixed precision; auto: on CUDA")
    add("--tf32", action="store_true", help="float32 matrix products of CUDA devices in TensorFloat-32")
    add("--compile", action="store_true", help="torch.compile: minutes at the start, then faster")
    add("--channels-last", action="store_true", help="images as B, H, W, C in memory, for convolutions")
    add("--grad-checkpointing", action="store_true", help="compute activations again instead of keeping them")
    add("--speed-batch-size", default=None, type=int, help="of --test_speed and --only_test_speed; default: the run's")


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default="deit_base_patch16_224", help="any name that timm or this repository registers")
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE", help="passed to the model")
    add("--input-size", nargs="+", type=int, default=None, help="pixels, or height and width; default: the model's")
    add("--nb-classes", type=int, default=None, help="default: from the data")
    add("--drop", type=float, default=0.0, help="dropout inside the blocks")
    add("--drop-path", type=float, default=0.1, help="stochastic depth of the last block")
    _switch(group, "model-ema", True, "keep an exponential moving average of the weights, and evaluate it too")
    add("--model-ema-decay", type=float, default=0.99996)
    add("--model-ema-force-cpu", action="store_true", help="keep the average on the CPU")


def _add_finetuning(parser: Parser) -> None:
    group = parser.add_argument_group("fine-tuning")
    add = group.add_argument
    add("--finetune", default="", metavar="FILE|URL", help="weights to start from; heads of another shape start anew")
    add("--freeze", default="", metavar="head|N", help="train the head alone, or the last N blocks, norm and head")
    add("--layer-decay", type=float, default=None, help="factor of the rate from each layer to the one below it")
    _switch(group, "train-mode", True, "train in training mode; the published fine-tuning did not")


def _add_optimization(parser: Parser) -> None:
    add = parser.add_argument_group("optimization").add_argument
    add("--opt", default="adamw", help="any of timm's optimizers")
    add("--opt-eps", default=1e-8, type=float)
    add("--opt-betas", default=None, type=float, nargs="+")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=0.05)
    add("--clip-grad", type=float, default=None, help="largest gradient norm")
    add("--lr", type=float, default=5e-4, help="for 512 images an update; scaled in proportion")
    add("--unscale-lr", action="store_true", help="take --lr as it is")
    add("--sched", default="cosine", help=", ".join(SCHEDULES))
    add("--lr-noise", type=float, nargs="+", default=None)
    add("--lr-noise-pct", type=float, default=0.67)
    add("--lr-noise-std", type=float, default=1.0)
    add("--warmup-lr", type=float, default=1e-6, help="rate of the first epoch")
    add("--min-lr", type=float, default=1e-5)
    add("--decay-epochs", type=float, default=30)
    add("--warmup-epochs", type=int, default=5, help="epochs in which the rate rises from --warmup-lr")
    add("--cooldown-epochs", type=int, default=10)
    add("--patience-epochs", type=int, default=10)
    add("--decay-rate", "--dr", type=float, default=0.1)
    add("--bce-loss", action="store_true", help="binary cross-entropy, every target above 0 becoming 1")


def _add_augmentation(parser: Parser) -> None:
    group = parser.add_argument_group("augmentation")
    add = group.add_argument
    add("--color-jitter", type=float, default=0.4, help="without effect while --aa is on, but for --ThreeAugment")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's AutoAugment policy, or none")
    add("--smoothing", type=float, default=0.1)
    add("--ThreeAugment", action="store_true", help="DeiT III's: grey, solarise or blur, then colour jitter")
    add("--src", action="store_true", help="with --ThreeAugment: resize and crop with padding, no random resized crop")
    add("--train-interpolation", default="bicubic", choices=("random", "bilinear", "bicubic"))
    _switch(group, "repeated-aug", True, "three augmentations of a third of the images an epoch")
    add("--reprob", type=float, default=0.25, help="probability of random erasing")
    add("--remode", default="pixel", choices=("pixel", "rand", "const"))
    add("--recount", type=int, default=1)
    add("--resplit", action="store_true")
    add("--mixup", type=float, default=0.8)
    add("--cutmix", type=float, default=1.0)
    add("--cutmix-minmax", type=float, nargs="+", default=None)
    add("--mixup-prob", type=float, default=1.0)
    add("--mixup-switch-prob", type=float, default=0.5)
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"))


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-set", default="IMNET", choices=DATA_SETS, help="FOLDER is any train/CLASS/ and val/CLASS/")
    add("--data-path", default=None, help="folder of the data")
    add(
        "--use-lmdb",
        action="store_true",
        help="read train.lmdb and val.lmdb, as folder2lmdb.py writes them, or the published script's",
    )
    add("--inat-category", default="name", choices=RANKS, help="what a class of iNaturalist is")
    add("--eval-crop-ratio", type=float, default=0.875)
    add("--transform", default="fast", choices=("fast", "timm"), help="timm: its transforms, the reference, and slower")
    add("--on-bad-image", default="error", choices=("error", "skip"), help="skip: train on another in its place")
    add("--num_workers", type=int, default=None, help="default: this process's share of the cores, at most 10")
    _switch(group, "pin-mem", True, "page-locked batches, for accelerators")


def _add_distillation(parser: Parser) -> None:
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher-model", default="regnety_160", help="any of timm's models")
    add("--teacher-path", default="", metavar="FILE|URL", help="the teacher's checkpoint")
    add("--distillation-type", default="none", choices=("none", "soft", "hard"))
    add("--distillation-alpha", type=float, default=0.5, help="share of the teacher in the loss")
    add("--distillation-tau", type=float, default=1.0, help="temperature of soft distillation")


def _add_reorganisation(parser: Parser) -> None:
    add = parser.add_argument_group("token reorganisation (EViT), for models that have keep rates").add_argument
    add("--base_keep_rate", type=float, default=0.7, help="share of the tokens that a block of --drop_loc keeps")
    add("--fuse_token", action="store_true", help="fuse the other tokens into one, instead of dropping them")
    add("--drop_loc", default="(3, 6, 9)", help="blocks that reorganise tokens, counted from 0")
    add("--shrink_start_epoch", type=int, default=10, help="all tokens are kept before it")
    add("--shrink_epochs", type=int, default=0, help="epochs in which the keep rate falls to --base_keep_rate")


def _add_pictures(parser: Parser) -> None:
    add = parser.add_argument_group("pictures of what a --resume checkpoint looks at, then stop").add_argument
    add("--visualize_mask", action="store_true", help="which patches are kept, of models that reorganise tokens")
    add("--visualize_attention", action="store_true", help="the class token's attention, of DHVT, DeiT and other ViTs")
    add("--n_visualization", type=int, default=128, help="images, evenly from the validation set or --image-dir")
    add("--image-dir", default=None, metavar="FOLDER", help="images without labels, in place of --data-path")


def _add_distribution(parser: Parser) -> None:
    add = parser.add_argument_group("distribution").add_argument
    add("--dist-backend", default=None, help="default: nccl on CUDA, gloo on the CPU")
    add("--dist-timeout", default=600.0, type=float, metavar="SECONDS", help="give up on a process that is silent")
    add("--dist-eval", action="store_true")
    add("--world_size", type=int, default=1)
    add("--dist_url", default="env://")
    add("--local_rank", type=int, default=0)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and check; raises InputError."""
    parser = build_parser()
    args = parser.parse_args(list(argv))
    check(args, parser)
    return args


def without_effect(args: argparse.Namespace) -> list[str]:
    """Say which of the given flags change nothing, and why."""
    given = [a for a in build_parser()._actions if a.dest in NO_EFFECT and getattr(args, a.dest) != a.default]
    lines = [f"{a.option_strings[0]} has no effect: {NO_EFFECT[a.dest]}" for a in given]
    if args.color_jitter != 0.4 and args.aa.lower() not in ("", "none") and not args.ThreeAugment:
        lines.append("--color-jitter has no effect while --aa is on")
    if args.src and not args.ThreeAugment:
        lines.append("--src has no effect without --ThreeAugment")
    if args.n_visualization != 128 and not find_pictures(args):
        lines.append("--n_visualization has no effect without --visualize_mask or --visualize_attention")
    for a in (a for a in build_parser()._actions if a.dest in ("aa", "reprob", "remode", "recount")):
        if args.ThreeAugment and getattr(args, a.dest) != a.default:
            lines.append(f"{a.option_strings[0]} has no effect: --ThreeAugment takes its place")
    unused = {"none": TEACHING, "hard": ("distillation_tau",), "soft": ()}[args.distillation_type]
    for a in (a for a in build_parser()._actions if a.dest in unused and getattr(args, a.dest) != a.default):
        lines.append(f"{a.option_strings[0]} has no effect: --distillation-type is {args.distillation_type}")
    return lines
