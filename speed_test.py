"""Throughput and MACs of any timm models, side by side; no data and no weights are needed.

    python speed_test.py dhvt_tiny_imagenet_patch16 deit_tiny_patch16_224 --batch-size 1 16 --output_dir OUT
    python speed_test.py deit_small_patch16_shrink_base:base_keep_rate=0.5 --baseline deit_small_patch16_224
    python speed_test.py --loader DATA

The last one measures how many training images per second the loader delivers.
"""

import csv
import json
import re
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, product
from operator import itemgetter
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib.figure import Figure

import datasets
import engine
from models.build import build_model, resolve_input_size
from util import distributed
from util.command import (
    Parser,
    add_flags,
    nonnegative_int,
    number,
    parse_key_values,
    parse_size,
    positive_float,
    positive_int,
    run_command,
)
from util.config import DATA_SETS, AugmentConfig, DataConfig, ModelConfig, describe_size, is_native_size
from util.errors import InputError
from util.precision import Precision, resolve_amp_dtype
from util.weights import first_line

# The default models: the backbones of figure 4 of EViT (arXiv 2202.07800), DHVT and EViT. With the ImageNet-1k top-1
# accuracy at 224 px that its authors published.
TOP1 = {
    "dhvt_tiny_imagenet_patch16": 77.6,
    "dhvt_small_imagenet_patch16": 82.3,
    "deit_small_patch16_shrink_base base_keep_rate=0.7 fuse_token=true": 79.5,
    "deit_tiny_patch16_224": 72.2,
    "deit_small_patch16_224": 79.8,
    "deit_base_patch16_224": 81.8,
    "swin_tiny_patch4_window7_224": 81.3,
    "swin_small_patch4_window7_224": 83.0,
    "twins_pcpvt_small": 81.2,
    "twins_svt_small": 81.7,
    "tnt_s_legacy_patch16_224": 81.5,
    "visformer_small": 82.2,
    "cait_xxs24_224": 77.6,
    "coat_lite_mini": None,
    "coat_lite_small": None,
    "convit_tiny": 73.1,
    "convit_small": 81.3,
    "dm_nfnet_f0": None,
    "efficientnet_b0": 77.1,
    "efficientnet_b3": None,
}

HEADER = (
    f"{'model':<44}{'mode':<10}{'batch':<6}{'pixels':<9}{'GMACs':<8}{'images/s':<10}{'spread':<15}"
    f"{'of matrix rate':<15}times baseline"
)

# The columns of a row that the plot has on its x axes.
AXES = {
    "gmacs": "GMACs per image",
    "top1": "published ImageNet-1k top-1 (%)",
    "batch_size": "batch size",
}

# Ways of loading: --transform, and a train.lmdb beside the folders.
LOADERS = ("timm", "fast", "fast, LMDB")


FLAGS = (
    ("--baseline", str, None, "model that each model is timed in turns with, to print the ratio"),
    ("--mode", ("inference", "train", "both"), "both", "forward passes, training steps, or both"),
    ("--batch-size", [positive_int], None, "default: 1, 2, 4, … up to --max-batch-size"),
    ("--max-batch-size", positive_int, None, "default: 64 on a CPU, what fits on other devices"),
    ("--input-size", [positive_int], None, "pixels, or height and width; default: each model's"),
    ("--image-sizes", [positive_int], None, "sweep square images of these sizes instead"),
    ("--seconds", positive_float, 1.0, "shortest length of a repeat; at least five are timed"),
    # fewer have no quartiles
    ("--pairs", number(int, lambda v: v >= 2, "at least 2"), None, "turns; default: 15, with --loader 5"),
    ("--output_dir", str, None, "folder for speed.csv, .json and .png, or loader.csv and .json"),
    # the training input instead of models
    ("--loader", str, None, "instead of models: folder of training data, to measure how fast it is loaded"),
    ("--data-set", DATA_SETS, "FOLDER", "with --loader: the data set, as for main.py"),
    ("--no-repeated-aug", bool, False, "with --loader: each image once per epoch"),
    ("--workers", [nonnegative_int], [1, datasets.default_workers()], "with --loader: numbers of workers to try"),
    # how models run
    ("--device", str, None, "for example cuda, cuda:1 or cpu; default: the best there is"),
    ("--amp", ("auto", "off", "fp16", "bf16"), "auto", "mixed precision, as for main.py"),
    ("--compile", bool, False, "torch.compile"),
    ("--channels-last", bool, False, "channels-last memory format"),
    ("--grad-checkpointing", bool, False, "recompute activations in the backward pass"),
)


def resolve_models(words: Sequence[str], size: Sequence[int] | None) -> dict[str, ModelConfig]:
    """Return the models of NAME:KEY=VALUE,… by "NAME KEY=VALUE …"; the name may be a pattern."""
    configs = {}
    for word in words:
        # the keys of TOP1 are words too
        pattern, *pairs = re.split("[:, ]", word)
        kwargs = parse_key_values(pairs, word)
        # timm lists no names with a tag, and none that do not exist: resolve_input_size takes the ones, not the others
        for name in timm.list_models(pattern) or [pattern]:
            input_size = resolve_input_size(name, parse_size(size), "model")
            configs[" ".join([name, *pairs])] = ModelConfig(name, input_size=input_size, kwargs=kwargs)
    return configs


def measure_models(args: Namespace, device: torch.device) -> Iterator[dict]:
    """Yield a row per model, mode and batch size; where a model fails, one with the error."""
    precision = Precision(device, resolve_amp_dtype(args.amp, device), args.channels_last)
    sizes = [[side] for side in args.image_sizes or ()] or [args.input_size]
    modes = ["inference", "train"] if args.mode == "both" else [args.mode]
    # On an accelerator batches grow until one does not fit into its memory.
    largest = args.max_batch_size or (64 if device.type == "cpu" else 2**20)
    batch_sizes = args.batch_size or [2**i for i in range(largest.bit_length())]
    # The baseline has its own input size, whatever the others' sweep is.
    if args.baseline:
        baseline_config, *_ = resolve_models([args.baseline], args.input_size).values()
        baseline = build_model(baseline_config, "--baseline", args.grad_checkpointing).to(device)

    computing = f"{precision}{', compiled' if args.compile else ''}"
    print(computing)
    print(HEADER)
    for size in sizes:
        for (label, config), mode in product(resolve_models(args.models or TOP1, size).items(), modes):
            row = {
                "model": label,
                "mode": mode,
                "input_size": describe_size(config.input_size),
                "top1": TOP1.get(label),
                "baseline": args.baseline,
                "precision": computing,
            }
            # A model's own code may raise anything. Its row says what, and the next model or mode follows.
            try:
                model = build_model(config, "model", args.grad_checkpointing)
                row["gmacs"] = engine.count_macs(model, config.input_size)
                model.to(device)
                for batch_size in batch_sizes:
                    row["batch_size"] = batch_size
                    how = {
                        "batch_size": batch_size,
                        "precision": precision,
                        "train": mode == "train",
                        "compiled": args.compile,
                    }
                    if args.baseline:
                        step = engine.make_step(model, config.input_size, **how)
                        baseline_step = engine.make_step(baseline, baseline_config.input_size, **how)
                        result = engine.compare_steps(step, baseline_step, batch_size, args.pairs or 15)
                    else:
                        result = engine.benchmark(
                            model,
                            config.input_size,
                            **how,
                            min_seconds=args.seconds,
                            gmacs=row["gmacs"],
                        )
                    yield row | result
            except Exception as error:
                # the first sentence: that a batch does not fit into memory takes PyTorch a paragraph
                yield row | {"error": first_line(error).partition(". ")[0]}


def measure_loaders(args: Namespace, device: torch.device) -> Iterator[dict]:
    """Yield a row per number of workers and way of loading: whole epochs, in turns with timm's transform."""
    # CIFAR and the digits come in 32 px
    side = 32 if is_native_size(args.data_set, (32, 32)) else 224
    size = parse_size(args.input_size) or (side, side)
    batch_size = (args.batch_size or [32])[0]
    for workers in args.workers:
        conditions = (
            f"{args.data_set} at {describe_size(size)}, batch {batch_size}, {workers} worker(s), default recipe, "
            f"repeated augmentation {'off' if args.no_repeated_aug else 'on'}"
        )
        print(conditions)
        timm_step = None
        for name in LOADERS:
            transform, _, lmdb = name.partition(", ")
            if lmdb and not Path(args.loader, "train.lmdb").exists():
                continue
            data = DataConfig(
                args.data_set,
                args.loader,
                lmdb=bool(lmdb),
                transform=transform,
                num_workers=workers,
            )
            dataset = datasets.build_train_set(data, ModelConfig("", input_size=size), AugmentConfig())
            loader = datasets.build_train_loader(
                dataset,
                data,
                batch_size=batch_size,
                repeated_aug=not args.no_repeated_aug,
                seed=0,
            )
            # A deque without room runs through an epoch.
            step = partial(deque, loader, maxlen=0)
            timm_step = timm_step or step
            row = engine.compare_steps(step, timm_step, len(loader) * batch_size, args.pairs or 5)
            yield {"loader": name, "workers": workers, "conditions": conditions, **row}


def format_row(row: dict) -> str:
    """Return the line that is printed of a row of `measure_models` or `measure_loaders`."""
    if "error" in row:
        return f"{row['model']} {row['mode']}: failed ({row['error']})"
    if "loader" in row:
        return (
            f"{row['loader']:<12}{row['images_per_s']:>9.1f} images/s, {row['ratio']:.2f} times timm's "
            f"(quartiles {row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"
        )
    text = (
        f"{row['model']:<43} {row['mode']:<9} {row['batch_size']:<5} {row['input_size']:<8} {row['gmacs']:<7.3f} "
        f"{row['images_per_s']:<9.1f} "
    )
    if "ratio" in row:
        # behind the columns that a comparison leaves empty
        return f"{text}{'':<30}{row['ratio']:.3f} ({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f})"
    spread = f"{'' if row['steady'] else 'unsteady '}± {row['spread']:.1f} %"
    return f"{text}{spread:<14} {row['share']:.0f} %"


def save(rows: list[dict], where: str, path: Path) -> None:
    """Write the rows to a CSV and a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".csv"), "w") as file:
        # Rows have different columns: one that failed has an error, and no images/s.
        writer = csv.DictWriter(file, dict.fromkeys(chain(*rows)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".json").write_text(json.dumps({"where": where, "rows": rows}, indent=1))


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Draw images/s against MACs, batch size and accuracy, where that is known; no picture if all models failed."""
    rows = [row for row in rows if "error" not in row]
    if not rows:
        return
    modes = dict.fromkeys(row["mode"] for row in rows)
    models = dict.fromkeys(row["model"] for row in rows)
    keys = [key for key in AXES if any(row[key] for row in rows)]
    # Of the rows at one x the last one is drawn: the largest image, and its best batch size.
    rows.sort(key=itemgetter("gmacs", "images_per_s"))

    # A line of panels per mode, and room for the legend
    figure = Figure((19, 4 * len(modes)), layout="constrained")
    grid = figure.subplots(len(modes), len(keys), squeeze=False)
    for axes, (mode, key) in zip(grid.flat, product(modes, keys), strict=True):
        for i, model in enumerate(models):
            points = {
                row[key]: row["images_per_s"]
                for row in rows
                # its accuracy may not be known
                if (row["model"], row["mode"]) == (model, mode) and row[key]
            }
            # colors repeat after ten models
            axes.plot(*np.transpose(sorted(points.items())), label=model, marker="osD^v"[i // 10 % 5])
        axes.set(title=mode, xlabel=AXES[key], ylabel="images/s")
        axes.grid()
        if key == "batch_size":
            axes.set_xscale("log", base=2)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def run(argv: Sequence[str]) -> None:
    parser = Parser(prog="speed_test.py", description="Measure images/s and MACs of models, side by side.")
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="NAME:KEY=VALUE,… with timm's names or patterns; default: the backbones of EViT's figure 4, DHVT and EViT",
    )
    add_flags(parser, FLAGS)
    args = parser.parse_args(argv)
    if args.models and args.loader:
        raise InputError("give models to measure or --loader DATA, not both")
    device = distributed.pick_device(args.device)
    where = f"{distributed.describe(device)}, torch {torch.__version__}, timm {timm.__version__}"
    print(where)
    # both print as they go and yield rows
    measure = measure_loaders if args.loader else measure_models
    path = args.output_dir and Path(args.output_dir, "loader" if args.loader else "speed")
    rows = []
    if path:
        # A folder that cannot be written to is found out now, and not after hours.
        save(rows, where, path)
    for row in measure(args, device):
        rows.append(row)
        print(format_row(row), flush=True)
        # What was measured stays when a sweep is stopped.
        if path:
            save(rows, where, path)
    if path and not args.loader:
        draw(rows, where, path)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("speed_test.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
