"""Throughput and MACs of any timm model: python speed_test.py MODEL[:KEY=VALUE,…] … [--baseline MODEL[:…]].

No data and no weights are needed. A model that fails is a row that says why, not the end.

With --loader, images/s of the training input instead: python speed_test.py --loader DATA [--data-set CIFAR].
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch

import datasets
import engine
from builders import build_model, find_amp_dtype, find_cfg, find_input_size
from util import distributed, options
from util.checks import FOLDERS
from util.errors import InputError
from util.options import Parser, read_pairs


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return the exit status: 0, or 2 for what the caller can mend."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.loader is None:
            measure(args, distributed.pick_device(args.device))
        else:
            measure_loaders(args)
    except InputError as error:
        print(f"speed_test.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="speed_test.py", description="Measure images/s and MACs of models, side by side.")
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="timm names or patterns, with arguments after a colon: NAME:K=V,K=V")
    add("--baseline", default=None, metavar="MODEL", help="time each model in turns with this one, and give the ratio")
    add("--batch-size", type=int, default=32)
    add("--input-size", type=int, nargs="+", default=None, help="pixels, or height and width; default: each model's")
    add("--train", action="store_true", help="whole training steps instead of inference")
    add("--pairs", type=int, default=None, help="turns in which things are compared; default: 15, of loaders 5")
    add("--loader", default=None, metavar="DATA", help="measure the training input from this folder, not models")
    add("--data-set", default="FOLDER", help="with --loader: as main.py's")
    add("--no-repeated-aug", action="store_true", help="with --loader: each image once an epoch")
    add("--workers", type=int, nargs="+", default=[1, datasets.default_workers()], help="with --loader: counts to try")
    add("--device", default=None, help="default: the best there is")
    add("--amp", default="auto", choices=("auto", "off", "fp16", "bf16"))
    args = parser.parse_args(list(argv))
    if bool(args.models) == (args.loader is not None):
        raise InputError("give models to measure, or --loader DATA; --help lists the flags")
    if args.pairs is None:
        args.pairs = 15 if args.loader is None else 5
    for flag, value, least in (("--batch-size", args.batch_size, 1), ("--pairs", args.pairs, 2)):
        if value < least:
            raise InputError(f"{flag} {value} must be at least {least}")
    return args


def find_models(words: Sequence[str]) -> list[tuple[str, dict]]:
    """Resolve NAME or PATTERN, each with :KEY=VALUE,… or without. Raises InputError for what matches nothing."""
    found = []
    for word in words:
        name, _, rest = word.partition(":")
        names = timm.list_models(name) if any(c in name for c in "*?[") else [name]
        if not names:
            raise InputError(f"{name}: no model has such a name; timm.list_models() lists them")
        for each in names:
            find_cfg(each, "model")
        found += [(each, read_pairs(rest.split(",") if rest else [], word)) for each in names]
    return found


def build(name: str, kwargs: dict, args: argparse.Namespace) -> tuple[torch.nn.Module, tuple[int, int]]:
    like_main = {"drop": 0.0, "drop_path": 0.1, "base_keep_rate": 0.7, "fuse_token": False, "drop_loc": "3,6,9"}
    options = argparse.Namespace(model=name, model_kwargs=kwargs, input_size=args.input_size, **like_main)
    size = find_input_size(options)
    return build_model(options, None, size), size


def measure(args: argparse.Namespace, device: torch.device) -> None:
    """Print a row a model: GMACs, images/s with their spread, and with a baseline the ratio with its quartiles."""
    precision = engine.Precision(device, find_amp_dtype(args.amp, device))
    models = find_models(args.models)
    baseline = build(*find_models([args.baseline])[0], args)[0].to(device) if args.baseline else None
    what = "training steps" if args.train else "inference"
    print(f"{what}, batch {args.batch_size}, {distributed.describe(device)}, torch {torch.__version__}")
    for name, kwargs in models:
        row = name + "".join(f" {k}={v}" for k, v in kwargs.items())
        try:
            model, size = build(name, kwargs, args)
            macs, model = engine.count_macs(model, size), model.to(device)
            if baseline is None:
                found = engine.benchmark(model, size, args.batch_size, precision, args.train)
                text = f"{found['images_per_s']:.1f} images/s ± {found['spread']:.0f} %"
            else:
                found = engine.compare(model, baseline, size, args.batch_size, precision, args.train, args.pairs)
                text = f"{found['images_per_s']:.1f} images/s, {args.baseline}: {found['baseline_images_per_s']:.1f}; "
                text += f"ratio {found['ratio']:.3f} (quartiles {found['ratio_q1']:.3f} to {found['ratio_q3']:.3f})"
            print(f"{row}: {macs:.3f} GMACs at {size[0]}x{size[1]}, {text}", flush=True)
        except (InputError, RuntimeError, AssertionError, ValueError) as error:
            print(f"{row}: failed ({(str(error) or type(error).__name__).splitlines()[0]})", flush=True)


def measure_loaders(args: argparse.Namespace) -> None:
    """Print a table a worker count: images/s of each way to feed the default recipe, and what only reads or decodes.

    A train.lmdb beside the folders is measured in the same turns.
    """
    flags = ["--data-set", args.data_set, "--data-path", args.loader, "--batch-size", str(args.batch_size)]
    flags += ["--no-repeated-aug"] if args.no_repeated_aug else []
    flags += ["--input-size", *map(str, args.input_size)] if args.input_size else []
    flags += ["--mixup", "0", "--cutmix", "0"] if args.batch_size % 2 else []
    small = args.data_set in ("CIFAR", "CIFAR-10", "DIGITS")
    size = tuple((args.input_size or [32 if small else 224]) * 2)[:2]
    for workers in dict.fromkeys(args.workers):
        given = options.parse([*flags, "--num_workers", str(workers)])
        loaders = datasets.build_benchmark_loaders(given, size)
        if given.data_set in FOLDERS and (Path(args.loader) / "train.lmdb").exists():
            given.use_lmdb = True
            others = datasets.build_benchmark_loaders(given, size)
            loaders |= {f"{name}, LMDB": others[name] for name in ("fast", "read")}
        print(
            f"{args.data_set} at {size[0]}x{size[1]}, batch {args.batch_size}, {workers} worker(s), default recipe, "
            f"repeated augmentation {'off' if args.no_repeated_aug else 'on'}; "
            f"{args.pairs} turns in one run, {distributed.describe(torch.device('cpu'))}"
        )
        for name, found in engine.benchmark_loaders(loaders, args.pairs).items():
            quartiles = f"quartiles {found['ratio_q1']:.2f} to {found['ratio_q3']:.2f}"
            text = f"{found['images_per_s']:>9.1f} images/s ± {found['spread']:.0f} %"
            print(f"{name:<12}{text}, {found['ratio']:.2f} times timm's ({quartiles})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
