"""Compare runs: python compare.py RUN… [--out FOLDER].

A RUN is an --output_dir of main.py, finished or not, or a folder of such folders. Runs with the same number of epochs
and of classes that differ only in seeds, fold or --data-path share a line, with mean ± standard deviation. A line is
named by the flags that set it apart, or by its folder if they are too many. Test accuracy comes from a report in
RUN/test (--eval --split test --report RUN/test).
"""

import csv
import json
import statistics
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import engine
from models.build import build_model
from util import options
from util.checkpoint import FLAGS_WITHOUT_EFFECT
from util.command import Parser, add_flags, run_command
from util.errors import InputError
from util.keep_rate import at_lowest_keep_rate
from util.log import RunLog

FLAGS = (
    ("--out", str, None, "folder for compare.csv and compare.png, the accuracies by epoch"),
    ("--x", str, None, "draw each model's accuracy by this flag instead, for example train_fraction"),
)

# flags in which the runs of one line may differ: seeds, folds, places, and what follows from other flags
IGNORED = FLAGS_WITHOUT_EFFECT | {
    "seed",
    "fold",
    "split_seed",
    "data_path",
    "effective_batch",
    "effective_lr",
    "n_parameters",
    "precision",
    "versions",
}

# numbers of a run: their titles, and how they are printed
COLUMNS = {
    "best top-1": ".2f",
    "last top-1": ".2f",
    "best EMA": ".2f",
    "test top-1": ".2f",
    "parameters (M)": ".3f",
    "GMACs": ".3f",
    "images/s": ".1f",
    "minutes": ".1f",
}


def read_run(folder: Path) -> dict[str, Any]:
    """Return a run's args, the flags that tell it apart, its curve {epoch: top-1} and its numbers, as in COLUMNS.

    Raises InputError, without the folder's name, for a run without results.
    """
    try:
        saved = json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):
        raise InputError("unreadable: no args.json, or a damaged one") from None
    epochs = RunLog(folder).read()
    tested = [line for line in epochs if "test_acc1" in line]
    if any("diverged" in line for line in epochs):
        raise InputError(f"diverged in epoch {epochs[-1]['epoch']}")
    if not tested:
        raise InputError("no epoch is finished")

    # flags that are newer than the run are at their defaults
    defaults = vars(options.build_parser().parse_args([])) | {"given": []}
    # lists, as in the file
    args = json.loads(json.dumps(defaults)) | saved
    at_rate = at_lowest_keep_rate(tested)
    numbers = [
        max(line["test_acc1"] for line in at_rate),
        tested[-1]["test_acc1"],
        max(line.get("test_ema_acc1", np.nan) for line in at_rate),
        read_test_accuracy(folder),
        args["n_parameters"] / 1e6,
        count_gmacs(args),
        statistics.median(line["images_per_s"] for line in epochs),
        sum(line["epoch_seconds"] for line in epochs) / 60,
    ]
    flags = {name: value for name, value in args.items() if name not in IGNORED}
    # the model's arguments are compared one by one
    flags.update(flags.pop("model_kwargs"))
    return {
        "folder": str(folder),
        "args": args,
        "flags": flags,
        "curve": {line["epoch"]: line["test_acc1"] for line in tested},
        "numbers": numbers,
    }


def read_test_accuracy(folder: Path) -> float:
    """Return the accuracy in percent that the report in RUN/test has, nan where there is none."""
    path = folder / "test" / "report.json"
    return 100 * float(json.loads(path.read_text())["accuracy"]) if path.exists() else np.nan


def count_gmacs(args: dict[str, Any]) -> float:
    """Return the GMACs of a run's model per image, nan where it cannot be built."""
    try:
        # without a download
        config = options.model_config(Namespace(**args | {"pretrained": False}))
        return engine.count_macs(build_model(config), config.input_size)
    # a model's own code may raise anything
    except Exception:
        return np.nan


def describe_groups(groups: Sequence[list[dict]]) -> Iterator[str]:
    """Yield the flags in which each group of runs differs from another one, or the model's name if there are none."""
    all_flags = [runs[0]["flags"] for runs in groups]
    for flags, runs in zip(all_flags, groups, strict=True):
        words = []
        for name, value in flags.items():
            if any(other.get(name) != value for other in all_flags):
                words.append(value if name == "model" else f"{name}={value}")
        label = " ".join(words) or flags["model"]
        yield label if len(label) <= 100 else runs[0]["folder"]


def mean_and_std(values: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation over the runs of [runs, columns]; of a single run it is 0."""
    values = np.array(values)
    return values.mean(axis=0), values.std(axis=0, ddof=min(1, len(values) - 1))


def format_line(label: str, runs: Sequence[dict]) -> str:
    """Return a line of the Markdown table."""
    cells = [label, f"{len(runs)}", f"{1 + max(runs[0]['curve'])}/{runs[0]['args']['epochs']}"]
    for style, mean, std in zip(COLUMNS.values(), *mean_and_std([run["numbers"] for run in runs]), strict=True):
        # parameters and MACs are the same for every seed, but for rounding
        spread = f" ± {std:{style}}" if std > 1e-9 else ""
        cells.append("-" if np.isnan(mean) else f"{mean:{style}}{spread}")
    return f"| {' | '.join(cells)} |"


def draw(labels: Sequence[str], groups: Sequence[list[dict]], path: Path) -> None:
    """Draw accuracy by epoch: the mean of each group's runs, and a band of one standard deviation."""
    figure = Figure((9, 5 + 0.25 * len(groups)), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="top-1 accuracy (%)")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    for i, (label, runs) in enumerate(zip(labels, groups, strict=True)):
        # epochs that all runs have evaluated
        epochs = sorted(set.intersection(*(set(run["curve"]) for run in runs)))
        mean, std = mean_and_std([[run["curve"][epoch] for epoch in epochs] for run in runs])
        # colors repeat after ten lines, which are dashed then
        color = f"C{i % 10}"
        axes.plot(
            epochs,
            mean,
            linestyle="--" if i // 10 % 2 else "-",
            color=color,
            label=f"{label} ({len(runs)})",
        )
        axes.fill_between(
            epochs,
            mean - std,
            mean + std,
            color=color,
            alpha=0.15,
        )
    figure.legend(loc="outside lower center")
    figure.savefig(path, dpi=200)


def draw_by(name: str, groups: Sequence[list[dict]], path: Path) -> None:
    """Draw accuracy, on the test set if all runs have it, by a flag: mean and standard deviation, a line per model."""
    titles = list(COLUMNS)
    column = titles.index("test top-1")
    if any(np.isnan(run["numbers"][column]) for runs in groups for run in runs):
        column = titles.index("best top-1")
    lines = defaultdict(list)
    for runs in groups:
        flags = runs[0]["flags"]
        if name not in flags:
            raise InputError(f"--x {name}: not a flag to compare runs by; give, for example, lr or train_fraction")
        mean, std = mean_and_std([run["numbers"] for run in runs])
        lines[flags["model"]].append((flags[name], mean[column], std[column]))
    values = [x for points in lines.values() for x, *_ in points]
    # names, sizes and None have no place between numbers
    as_shown = float if all(isinstance(x, int | float) for x in values) else str

    figure = Figure((7, 5), layout="constrained")
    axes = figure.add_subplot(xlabel=name, ylabel=f"{titles[column]} accuracy (%)")
    axes.grid(alpha=0.3)
    for model, points in lines.items():
        x, mean, std = zip(*sorted((as_shown(x), *rest) for x, *rest in points), strict=True)
        axes.errorbar(
            x,
            mean,
            yerr=std,
            marker="o",
            capsize=3,
            label=model,
        )
    if as_shown is float:
        # learning rates and fractions are chosen by factors
        ticks = sorted(set(values))
        axes.set_xscale("log" if ticks[0] > 0 else "linear")
        axes.set_xticks(ticks, labels=[f"{x:g}" for x in ticks])
        axes.minorticks_off()
    figure.legend(loc="outside lower center")
    figure.savefig(path, dpi=200)


def find_groups(words: Sequence[str]) -> tuple[list[list[dict]], list[list[str]]]:
    """Return the runs in folders, each once, grouped by the flags that tell them apart; and lines on unusable ones."""
    folders = {}
    for word in words:
        paths = sorted(Path(word).rglob("args.json"))
        if not paths:
            raise InputError(f"{word}: no args.json in or below it; name the --output_dir of a run")
        for path in paths:
            folders[path.parent.resolve()] = path.parent

    found = defaultdict(list)
    errors = []
    for folder in folders.values():
        try:
            run = read_run(folder)
            # average only runs of the same length, and on as many classes
            key = json.dumps(run["flags"], sort_keys=True), max(run["curve"]), run["args"]["n_parameters"]
            found[key].append(run)
        except InputError as error:
            errors.append([f"{folder}: {error}"])
        except (LookupError, TypeError, ValueError) as error:
            errors.append([f"{folder}: damaged ({error!r})"])
    return list(found.values()), errors


def run(argv: list[str]) -> None:
    parser = Parser(prog="compare.py", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run, or of runs",
    )
    add_flags(parser, FLAGS)
    args = parser.parse_args(argv)
    if args.x and not args.out:
        raise InputError("--x draws to a folder: add --out FOLDER")

    groups, errors = find_groups(args.runs)
    labels = list(describe_groups(groups))

    print(f"| run | n | epochs | {' | '.join(COLUMNS)} |\n|{'---|' * (3 + len(COLUMNS))}")
    table = []
    for label, runs in zip(labels, groups, strict=True):
        print(format_line(label, runs))
        table += [[label, run["args"]["seed"], *run["numbers"]] for run in runs]
    for (error,) in errors:
        print(f"| {error} |")

    # each run by itself, and the picture
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "compare.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file, lineterminator="\n").writerows([["run", "seed", *COLUMNS], *table, *errors])
        if groups and args.x:
            draw_by(args.x.replace("-", "_"), groups, out / "compare.png")
        elif groups:
            draw(labels, groups, out / "compare.png")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("compare.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
