"""What a training or an evaluation tells people in words."""

import argparse
import math
import shlex
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from util import checkpoint, distributed
from util.distributed import print0
from util.measure import benchmark, count_macs
from util.precision import Precision
from util.run_state import Progress


def announce(
    args: argparse.Namespace,
    train_loader: DataLoader,
    val_set: Dataset,
    n_parameters: int,
    lr_sum: dict[str, Any],
    updates: int,
) -> None:
    """Say what will be trained on what, and what may surprise."""
    n, sampler = len(train_loader.dataset), train_loader.sampler
    print0(f"Model {args.model}; number of params: {n_parameters}")
    print0(lr_sum["text"])
    distinct = sampler.distinct_images(n, args.batch_size)
    print0(
        f"{n} training and {len(val_set)} test images; an epoch of {updates} updates shows {distinct} distinct images"
        + (" (--repeated-aug)" if args.repeated_aug else "")
    )
    if args.warmup_epochs >= args.epochs and args.sched != "constant":
        print0(
            f"The rate only warms up, from {args.warmup_lr:g}: --warmup-epochs {args.warmup_epochs} are not "
            f"fewer than --epochs {args.epochs}; lower them"
        )
    if not args.train_mode:
        print0("The model stays in evaluation mode: its norms' statistics and drop path are off (--no-train-mode)")
    elif args.finetune:
        norms = "frozen norms stay as they are, the others" if args.freeze else "norms"
        print0(f"Fine-tuning in training mode: {norms} follow the data, drop path acts; --no-train-mode as published")
    left = args.model_ema_decay ** (updates * args.epochs)
    if args.model_ema and left > 0.1:
        print0(
            f"EMA: {left:.0%} of the initial weights will remain in the average; lower --model-ema-decay to forget them"
        )


def print_accuracy(test: dict[str, float], num_classes: int | None = None) -> None:
    """Print an evaluation; with `num_classes`, say also when it is no better than chance."""
    print0(f"* Acc@1 {test['acc1']:.3f} Acc@{test['topk']} {test['acc5']:.3f} loss {test['loss']:.3f}")
    print0(f"Accuracy of the network on the {test['count']} test images: {test['acc1']:.1f}%")
    if num_classes is None or num_classes < 2:
        return
    chance = 1 / num_classes
    if test["acc1"] / 100 < chance + 2 * math.sqrt(chance * (1 - chance) / test["count"]):
        print0(f"This is chance for {num_classes} classes: is it the right checkpoint, and are the classes in order?")


def describe_speed(found: dict[str, Any]) -> str:
    """Put what `benchmark` found in a line."""
    steady = "±" if found["steady"] else "unsteady ±"
    return (
        f"{found['mode']}: {found['images_per_s']:.1f} images/s {steady} {found['spread']:.1f} % "
        f"({found['ms_per_batch']:.1f} ms a batch of {found['batch_size']}), {found['share']:.0f} % of the machine's "
        f"{found['matrix_gmacs_per_s']:.0f} GMAC/s in matrix products, {found['precision']}, peak memory "
        f"{found['peak_memory_mib']:.0f} MiB, {found['device']}, torch {found['torch']}"
    )


def report_speed(args: argparse.Namespace, model: nn.Module, size: tuple[int, int], precision: Precision) -> None:
    """Print throughput and MACs, on rank 0; under --output_dir they go to speed_macs.txt too."""
    if not distributed.is_primary():
        return
    gmacs = count_macs(model, size)
    lines = [f"{args.model}: {gmacs:.3f} GMACs (1 MAC = 2 FLOPs) at {size[0]}x{size[1]}"]
    print0(lines[0])
    batch = args.speed_batch_size or args.batch_size
    for train in (False, True):
        found = benchmark(model, size, batch, precision, train, compiled=args.compile, gmacs=gmacs)
        lines.append(describe_speed(found))
        print0(lines[-1])
    if args.output_dir:
        folder = Path(args.output_dir)
        with checkpoint.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_atomic(folder / "speed_macs.txt", ("\n".join(lines) + "\n").encode())


def close(args: argparse.Namespace, progress: Progress, seconds: float) -> None:
    """Say how good it got, where that is, and how to see it again."""
    print0(f"Trained for {timedelta(seconds=round(seconds))}")
    if args.model_ema:
        print0(f"Best EMA accuracy {progress.max_accuracy_ema:.2f}% (epoch {progress.best_epoch_ema})")
    text = f"Best accuracy {progress.max_accuracy:.2f}% (epoch {progress.best_epoch}"
    text += ")" if progress.best_keep_rate is None else f", keep rate {progress.best_keep_rate:g})"
    if not args.output_dir:
        print0(f"{text}; nothing was saved: no --output_dir")
        return
    best = Path(args.output_dir) / "best_checkpoint.pth"
    script = sys.argv[0] if Path(sys.argv[0]).name == "main.py" else "main.py"
    command = ["python", script, "--eval", "--resume", str(best), "--model", args.model, "--data-set", args.data_set]
    command += ["--data-path", args.data_path] if args.data_path else []
    command += ["--use-lmdb"] if args.use_lmdb else []
    command += ["--inat-category", args.inat_category] if args.data_set in ("INAT", "INAT19") else []
    command += ["--input-size", *map(str, args.input_size)] if args.input_size else []
    command += ["--nb-classes", str(args.nb_classes)] if args.nb_classes else []
    command += ["--model-kwargs", *(f"{k}={v}" for k, v in args.model_kwargs.items())] if args.model_kwargs else []
    command += ["--eval-crop-ratio", str(args.eval_crop_ratio)] if args.eval_crop_ratio != 0.875 else []
    if progress.best_keep_rate is not None:
        command += ["--base_keep_rate", f"{progress.best_keep_rate:g}", "--drop_loc", args.drop_loc]
        command += ["--fuse_token"] if args.fuse_token else []
    print0(f"{text}, in {best}; evaluate it with: {shlex.join(command)}")
