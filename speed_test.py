"""Throughput and MACs of any timm models: python speed_test.py [MODEL[:KEY=VALUE,…] …] [--baseline MODEL[:…]].

No data and no weights are needed. A model that fails is a row that says why, not the end.

With --loader, images/s of the training input instead: python speed_test.py --loader DATA [--data-set CIFAR].
"""

import argparse
import csv
import io
import itertools
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

import datasets
import engine
from builders import build_model, find_amp_dtype, find_cfg, find_input_size, speed_up
from util import checkpoint, distributed, measure, options, speed_plot
from util.checks import FOLDERS
from util.errors import InputError
from util.options import Parser, read_pairs

# the backbones of EViT's figure 4, and ours
MODELS = (
    "dhvt_tiny_imagenet_patch16",
    "dhvt_small_imagenet_patch16",
    "deit_small_patch16_shrink_base:base_keep_rate=0.7,fuse_token=true",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "twins_pcpvt_small",
    "twins_svt_small",
    "tnt_s_legacy_patch16_224",
    "visformer_small",
    "cait_xxs24_224",
    "coat_lite_mini",
    "coat_lite_small",
    "convit_tiny",
    "convit_small",
    "dm_nfnet_f0",
    "efficientnet_b0",
    "efficientnet_b3",
)
COLUMNS = {  # of the table: width, and the row's value as text
    "model": (44, lambda r: r["model"]),
    "mode": (10, lambda r: r["mode"]),
    "batch": (6, lambda r: str(r["batch_size"])),
    "pixels": (9, lambda r: r["input_size"]),
    "GMACs": (8, lambda r: f"{r['gmacs']:.3f}"),
    "images/s": (10, lambda r: f"{r['images_per_s']:.1f}"),
    "spread": (15, lambda r: "" if "spread" not in r else "unsteady " * (not r["steady"]) + f"± {r['spread']:.1f} %"),
    "of matrix rate": (15, lambda r: f"{r['share']:.0f} %" if "share" in r else ""),
    "times baseline": (
        0,
        lambda r: f"{r['ratio']:.3f} ({r['ratio_q1']:.3f} to {r['ratio_q3']:.3f})" if "ratio" in r else "",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return the exit status: 0, or 2 for what the caller can mend."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.loader is None:
            measure_models(args, distributed.pick_device(args.device))
        else:
            measure_loaders(args)
    except InputError as error:
        print(f"speed_test.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="speed_test.py", description="Measure images/s and MACs of models, side by side.")
    add = parser.add_argument
    text = "timm names or patterns, with arguments after a colon: NAME:K=V,K=V; default: EViT's figure 4, DHVT and EViT"
    add("models", nargs="*", metavar="MODEL", help=text)
    add("--baseline", default=None, metavar="MODEL", help="time each model in turns with this one, and give the ratio")
    add("--mode", default="both", choices=("inference", "train", "both"), help="forward passes, whole training steps")
    add("--batch-size", type=int, nargs="+", default=None, help="default: 1, 2, 4, … to --max-batch-size")
    add("--max-batch-size", type=int, default=None, help="default: 64 on a CPU, what fits on a GPU")
    add("--input-size", type=int, nargs="+", default=None, help="pixels, or height and width; default: each model's")
    add("--image-sizes", type=int, nargs="+", default=None, help="sweep square images of these sizes instead")
    add("--seconds", type=float, default=1.0, help="length of a repeat; five at least are timed")
    add("--pairs", type=int, default=None, help="turns in which things are compared; default: 15, of loaders 5")
    add("--output_dir", default=None, metavar="FOLDER", help="write speed.csv, speed.json and speed.png there")
    add("--loader", default=None, metavar="DATA", help="measure the training input from this folder, not models")
    add("--data-set", default="FOLDER", help="with --loader: as main.py's")
    add("--no-repeated-aug", action="store_true", help="with --loader: each image once an epoch")
    add("--workers", type=int, nargs="+", default=[1, datasets.default_workers()], help="with --loader: counts to try")
    add("--device", default=None, help="default: the best there is")
    add("--amp", default="auto", choices=("auto", "off", "fp16", "bf16"))
    add("--compile", action="store_true", help="torch.compile")
    add("--channels-last", action="store_true")
    add("--grad-checkpointing", action="store_true")
    args = parser.parse_args(list(argv))
    if args.models and args.loader is not None:
        raise InputError("give models to measure, or --loader DATA, not both")
    if args.pairs is None:
        args.pairs = 15 if args.loader is None else 5
    given = [("--batch-size", size, 1) for size in args.batch_size or ()]
    given += [("--image-sizes", size, 1) for size in args.image_sizes or ()]
    for flag, value, least in (*given, ("--max-batch-size", args.max_batch_size, 1), ("--pairs", args.pairs, 2)):
        if value is not None and value < least:
            raise InputError(f"{flag} {value} must be at least {least}")
    if not 0 < args.seconds < float("inf"):
        raise InputError(f"--seconds {args.seconds:g} must be above 0")
    if args.input_size is not None and (len(args.input_size) > 2 or min(args.input_size) < 1):
        raise InputError(f"--input-size {' '.join(map(str, args.input_size))} must be one number or height and width")
    if args.output_dir and Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise InputError(f"--output_dir {args.output_dir}: it is a file; name a folder")
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


def build(name: str, kwargs: dict, args: argparse.Namespace) -> tuple[nn.Module, tuple[int, int]]:
    like_main = {"drop": 0.0, "drop_path": 0.1, "base_keep_rate": 0.7, "fuse_token": False, "drop_loc": "3,6,9"}
    options = argparse.Namespace(model=name, model_kwargs=kwargs, input_size=args.input_size, **like_main)
    options.grad_checkpointing, options.channels_last = args.grad_checkpointing, args.channels_last
    size = find_input_size(options)
    return speed_up(options, build_model(options, None, size)), size


def batch_sizes(args: argparse.Namespace, device: torch.device) -> Iterator[int]:
    """Give the batch sizes to measure; without an end where the device's memory is one."""
    if args.batch_size:
        yield from dict.fromkeys(args.batch_size)
        return
    most = args.max_batch_size or (64 if device.type == "cpu" else None)
    size = 1
    while most is None or size <= most:
        yield size
        size *= 2


def measure_models(args: argparse.Namespace, device: torch.device) -> None:
    """Print a table, a row a model, mode and batch size, and write what --output_dir asks for."""
    precision = engine.Precision(device, find_amp_dtype(args.amp, device), args.channels_last)
    models = find_models(args.models or MODELS)
    baseline = build(*find_models([args.baseline])[0], args) if args.baseline else None
    where = f"{distributed.describe(device)}, torch {torch.__version__}, timm {timm.__version__}"
    print(f"{precision}{', compiled' if args.compile else ''}, {where}")
    print("".join(f"{name:<{width}}" for name, (width, _) in COLUMNS.items()).rstrip(), flush=True)
    if args.output_dir:  # found out now, not after hours
        try:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output_dir {args.output_dir}: {error}; name another folder") from None
    rows = []
    sizes = [args.input_size] if args.image_sizes is None else [[size] for size in args.image_sizes]
    for (name, kwargs), args.input_size in itertools.product(models, sizes):
        for row in measure_model(name, kwargs, baseline, args, precision):
            rows.append({"model": name + "".join(f" {k}={v}" for k, v in kwargs.items()), "name": name} | row)
            print(describe(rows[-1]), flush=True)
    if args.output_dir:
        write(rows, Path(args.output_dir), where)


def describe(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['model']}{' ' + row['mode'] if 'mode' in row else ''}: failed ({row['error']})"
    return "".join(f"{text(row):<{width - 1}} " if width else text(row) for width, text in COLUMNS.values()).rstrip()


def measure_model(
    name: str,
    kwargs: dict,
    baseline: tuple[nn.Module, tuple[int, int]] | None,
    args: argparse.Namespace,
    precision: engine.Precision,
) -> Iterator[dict[str, Any]]:
    """Yield a row a mode and batch size; where something fails, one that says why, and none after it in that mode."""
    try:
        model, size = build(name, kwargs, args)
        gmacs = count_quietly(model, size)
        model.to(precision.device)
    except Exception as error:  # whatever a model's code makes of its arguments
        yield {"error": first_line(error)}
        return
    about = {"gmacs": gmacs, "params": sum(p.numel() for p in model.parameters()), "compiled": args.compile}
    for mode in ("inference", "train") if args.mode == "both" else (args.mode,):
        for batch in batch_sizes(args, precision.device):
            row = about | {"mode": mode, "batch_size": batch, "input_size": f"{size[0]}x{size[1]}"}
            try:
                yield row | measure_row(model, size, batch, mode == "train", baseline, args, precision, gmacs)
            except torch.OutOfMemoryError:
                yield row | {"error": f"batch {batch} does not fit"}
                break
            except Exception as error:
                what = "--compile: " if isinstance(error, TorchDynamoException) else ""
                yield row | {"error": what + first_line(error)}
                break


def measure_row(
    model: nn.Module,
    size: tuple[int, int],
    batch: int,
    train: bool,
    baseline: tuple[nn.Module, tuple[int, int]] | None,
    args: argparse.Namespace,
    precision: engine.Precision,
    gmacs: float,
) -> dict[str, Any]:
    if baseline is None:
        return engine.benchmark(
            model, size, batch, precision, train, min_seconds=args.seconds, compiled=args.compile, gmacs=gmacs
        )
    other = baseline[0].to(precision.device)
    return engine.compare(model, other, size, batch, precision, train, args.pairs, args.compile, baseline[1])


def count_quietly(model: nn.Module, size: tuple[int, int]) -> float:
    """Count MACs; what the two counters make of a model differently is said in a line, not as a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        gmacs = engine.count_macs(model, size)
    for warning in caught:
        if "flop counter" in str(warning.message):
            print(f"{model.pretrained_cfg['architecture']}: {warning.message}", flush=True)
    return gmacs


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def write(rows: list[dict[str, Any]], folder: Path, where: str) -> None:
    """Write the rows as speed.csv, speed.json and speed.png, each whole or not at all."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    record = {"where": where, "rows": rows}
    checkpoint.write_atomic(folder / "speed.csv", text.getvalue().encode())
    checkpoint.write_atomic(folder / "speed.json", (json.dumps(record, indent=1) + "\n").encode())
    checkpoint.write_atomic(folder / "speed.png", speed_plot.draw(rows, where))
    print(f"speed.csv, speed.json and speed.png are in {folder}")


def measure_loaders(args: argparse.Namespace) -> None:
    """Print a table a worker count: images/s of each way to feed the default recipe, and what only reads or decodes.

    A train.lmdb beside the folders is measured in the same turns.
    """
    batch = (args.batch_size or [32])[0]
    flags = ["--data-set", args.data_set, "--data-path", args.loader, "--batch-size", str(batch)]
    flags += ["--no-repeated-aug"] if args.no_repeated_aug else []
    flags += ["--input-size", *map(str, args.input_size)] if args.input_size else []
    flags += ["--mixup", "0", "--cutmix", "0"] if batch % 2 else []
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
            f"{args.data_set} at {size[0]}x{size[1]}, batch {batch}, {workers} worker(s), default recipe, "
            f"repeated augmentation {'off' if args.no_repeated_aug else 'on'}; "
            f"{args.pairs} turns in one run, {distributed.describe(torch.device('cpu'))}"
        )
        for name, found in measure.benchmark_loaders(loaders, args.pairs).items():
            quartiles = f"quartiles {found['ratio_q1']:.2f} to {found['ratio_q3']:.2f}"
            text = f"{found['images_per_s']:>9.1f} images/s ± {found['spread']:.0f} %"
            print(f"{name:<12}{text}, {found['ratio']:.2f} times timm's ({quartiles})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
