"""Throughput and MACs of any timm models, side by side; no data and no weights are needed.

python speed_test.py dhvt_tiny_imagenet_patch16 deit_tiny_patch16_224 --batch-size 1 16 --output_dir OUT
python speed_test.py deit_small_patch16_shrink_base:base_keep_rate=0.5 --baseline deit_small_patch16_224
"""

import csv
import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import chain, product
from operator import itemgetter
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure

import engine
from models.build import build_model
from util import distributed
from util.command import (
    IMPORT_FLAG,
    Parser,
    add_flags,
    number,
    parse_key_values,
    parse_size,
    positive_float,
    positive_int,
    run_command,
)
from util.config import ModelConfig, describe_size, resolve_input_size
from util.errors import InputError, first_line
from util.precision import AMP_FLAG, DTYPES, Precision, resolve_amp

# The default models (the backbones of figure 4 of EViT, arXiv 2202.07800, DHVT and EViT), and their published
# ImageNet-1k top-1 accuracy at 224 px; None: not known
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
    "gmacs": "GMACs per image (best batch size)",
    "top1": "published ImageNet-1k top-1 (%)",
    "batch_size": "batch size (largest images)",
}

FLAGS = (
    IMPORT_FLAG,
    ("--baseline", str, None, "model to time in alternation with each model, to print the ratio of speeds"),
    ("--mode", ("inference", "train", "both"), "both", "forward passes, training steps, or both"),
    ("--batch-size", [positive_int], None, "default: 1, 2, 4, … up to --max-batch-size"),
    ("--max-batch-size", positive_int, None, "default: 64 on a CPU, what fits on other devices"),
    ("--input-size", [positive_int], None, "pixels, or height and width; default: each model's"),
    ("--image-sizes", [positive_int], None, "sweep square images of these sizes instead"),
    ("--seconds", positive_float, 1.0, "least time per measurement; up to 30 times as long until it is steady"),
    # fewer have no quartiles
    ("--pairs", number(int, lambda v: v >= 2, "at least 2"), 15, "number of turns with --baseline"),
    ("--output_dir", str, None, "folder for speed.csv, .json and .png"),
    # how models run
    ("--device", str, None, "for example cuda, cuda:1 or cpu; default: the best there is"),
    AMP_FLAG,
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
        if "img_size" in kwargs:
            raise InputError(f"{word}: use --input-size or --image-sizes instead of img_size")
        # timm lists neither names with a tag nor unknown names; resolve_input_size raises an error for unknown names
        for name in timm.list_models(pattern) or [pattern]:
            input_size = resolve_input_size(name, parse_size(size), "model")
            configs[" ".join([name, *pairs])] = ModelConfig(name, input_size=input_size, kwargs=kwargs)
    return configs


def measure_models(args: Namespace, device: torch.device) -> Iterator[dict]:
    """Print the head of the table; yield a row per model, mode and batch size, or one with the error."""
    precision = Precision(device, DTYPES[resolve_amp(args.amp, device)], args.channels_last)
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
                "top1": TOP1.get(label) if config.input_size == (224, 224) else None,
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
                    step_args = {
                        "batch_size": batch_size,
                        "precision": precision,
                        "train": mode == "train",
                        "compile_mode": "default" if args.compile else None,
                    }
                    if args.baseline:
                        step = engine.make_step(model, config.input_size, **step_args)
                        baseline_step = engine.make_step(baseline, baseline_config.input_size, **step_args)
                        result = engine.compare_steps(step, baseline_step, batch_size, args.pairs)
                    else:
                        result = engine.benchmark(
                            model,
                            config.input_size,
                            **step_args,
                            min_seconds=args.seconds,
                            gmacs=row["gmacs"],
                        )
                    yield row | result
            except Exception as error:
                # the first sentence: that a batch does not fit into memory takes PyTorch a paragraph
                yield row | {"error": first_line(error).partition(". ")[0]}


def format_row(row: dict) -> str:
    """Return the line that is printed of a row."""
    if "error" in row:
        return f"{row['model']} {row['mode']}: failed ({row['error']})"
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
    baseline = rows[0]["baseline"]
    modes = dict.fromkeys(row["mode"] for row in rows)
    models = dict.fromkeys(row["model"] for row in rows)
    # an axis on which all rows are at one place shows nothing
    keys = [key for key in AXES if len({row[key] for row in rows} - {None}) > 1] or ["batch_size"]
    # Of the rows at one x the last one is drawn: the largest image, and its best batch size.
    rows.sort(key=itemgetter("gmacs", "images_per_s"))

    # A line of panels per mode, and room for the legend
    figure = Figure((5.5 * len(keys) + 3.5, 4 * len(modes) + 0.5), layout="constrained")
    grid = figure.subplots(len(modes), len(keys), squeeze=False)
    for axes, (mode, key) in zip(grid.flat, product(modes, keys), strict=True):
        for i, model in enumerate(models):
            # one row per x, and none where its accuracy is not known
            found = {row[key]: row for row in rows if (row["model"], row["mode"]) == (model, mode) and row[key]}
            points = [found[x] for x in sorted(found)]
            x = [row[key] for row in points]
            y = [row["images_per_s"] for row in points]
            bars = [row["images_per_s"] * row.get("spread", 0) / 200 for row in points]
            # colors repeat after ten models
            axes.errorbar(x, y, bars, label=model, color=f"C{i % 10}", marker="osD^v"[i // 10 % 5], capsize=2)
            unsteady = [i for i, row in enumerate(points) if not row.get("steady", True)]
            axes.plot(x, y, "wo", ms=3, ls="", markevery=unsteady, zorder=3)
            if baseline:
                axes.plot(x, [row["baseline_images_per_s"] for row in points], "kx:")
        axes.set(title=mode, xlabel=AXES[key], ylabel="images/s")
        axes.grid()
        axes.set_ylim(bottom=0)
        if key == "batch_size":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
    # what holds for all panels
    axes.plot([], [], "wo", ms=3, mec="grey", label="white dot: unsteady")
    if baseline:
        axes.plot([], [], "kx:", label=f"{baseline}, in turns")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", title="bars: interquartile range")
    figure.suptitle(f"{title}, {rows[0]['precision']}")
    figure.savefig(path, dpi=200)


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
    device = distributed.pick_device(args.device)
    where = f"{distributed.describe(device)}, torch {torch.__version__}, timm {timm.__version__}"
    print(where)
    path = args.output_dir and Path(args.output_dir, "speed")
    rows = []
    if path:
        # A folder that cannot be written to is found out now, and not after hours.
        save(rows, where, path)
    for row in measure_models(args, device):
        rows.append(row)
        print(format_row(row), flush=True)
        # What was measured stays when a sweep is stopped.
        if path:
            save(rows, where, path)
    if path:
        draw(rows, where, path.with_suffix(".png"))


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("speed_test.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
