"""One experiment: build data and model, then measure, evaluate or train. `python main.py --help` lists the flags."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

import datasets
import engine
import training
from builders import (
    build_model,
    check_classes,
    count_classes,
    count_head,
    find_amp_dtype,
    find_input_size,
    seed_everything,
    speed_up,
)
from util import checkpoint, checks, distributed, finetune, options, visualize
from util.distributed import print0
from util.errors import InputError, NonFiniteLossError, PreemptedError
from util.preemption import Preemption, follow_parent
from util.report import print_accuracy, report_speed
from util.run_state import check_output_dir, load_resumed, unlock


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit status.

    0; 2 for what the caller can mend; 1 for a diverged training or a lost process; 75 where a signal stopped a run
    that goes on from there, and 130 where Ctrl-C stopped something else.
    """
    try:
        args = options.parse(sys.argv[1:] if argv is None else argv)
        follow_parent()
        run(args, distributed.init(args.device, args.dist_backend, args.dist_timeout))
    except (InputError, NonFiniteLossError, PreemptedError, KeyboardInterrupt, RuntimeError) as error:
        line, status = explain(error)
        if line:
            where = f" [rank {distributed.rank()}]" if distributed.is_distributed() else ""
            print(f"main.py: error{where}: {line}" if status < 3 else f"main.py: {line}", file=sys.stderr, flush=True)
        return status
    finally:
        unlock()
        distributed.shutdown()
    return 0


def explain(error: BaseException) -> tuple[str, int]:
    """Put what ended the program in one line, "" where another process says it, with the exit status.

    Raises what has no explanation.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    match error:
        case InputError():  # what comes from a loader's worker has its traceback before it
            return lines[-1].removeprefix("util.errors.InputError: "), 2
        case NonFiniteLossError():
            return lines[-1], 1
        case PreemptedError():
            return lines[-1] if distributed.is_primary() else "", 75
        case KeyboardInterrupt():
            return "stopped", 130
        case TorchDynamoException():
            return f"--compile: {lines[0]}; leave it out", 2
    if "DataLoader worker" in lines[0]:
        return f"{lines[0]} Out of memory? Try fewer --num_workers, or in a container a larger --shm-size", 1
    if "deterministic" in lines[0]:
        return f"--deterministic: {lines[0]}; leave it out", 2
    if distributed.is_lost_connection(error):
        return "lost the others: one of them ended, and has said why, or is silent (--dist-timeout)", 1
    raise error


def run(args: argparse.Namespace, device: torch.device) -> None:
    for line in options.without_effect(args):
        print0(line)
    size = find_input_size(args)
    precision = engine.Precision(device, find_amp_dtype(args.amp, device), args.channels_last)
    if args.deterministic:
        distributed.make_deterministic()
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    seed_everything(args.seed + distributed.rank())
    if args.only_test_speed:
        report_speed(args, speed_up(args, build_model(args, args.nb_classes, size)).to(device), size, precision)
        return
    check_output_dir(args)
    saved, source = load_resumed(args)
    if checks.find_pictures(args):
        run_pictures(args, saved, source, size, precision)
    elif args.eval:
        run_evaluation(args, saved, source, size, precision)
    elif not args.output_dir:  # there is nowhere to save what a signal interrupts
        training.train(args, saved, source, size, precision, None)
    else:
        with Preemption(args.checkpoint_interval) as preemption:
            training.train(args, saved, source, size, precision, preemption)


def run_evaluation(
    args: argparse.Namespace, saved: dict[str, Any], source: str, size: tuple[int, int], precision: engine.Precision
) -> None:
    dataset = datasets.build_val_dataset(args, size, saved.get("classes"))
    check_classes(saved, source, dataset.classes)
    model = load_evaluated(args, saved, source, count_classes(args, dataset.classes), size).to(precision.device)
    weights = f"{'EMA' if args.use_ema else 'raw'} weights of {source or 'timm'}"
    print0(f"Evaluating {args.model} at {size[0]}x{size[1]} pixels, {weights}")
    if args.test_speed:
        report_speed(args, model, size, precision)
    speed_up(args, model)
    if args.compile:
        model.compile()
    test = engine.evaluate(model, datasets.build_val_loader(args, dataset), precision)
    print_accuracy(test, model.num_classes)


def load_evaluated(
    args: argparse.Namespace, saved: dict[str, Any], source: str, num_classes: int | None, size: tuple[int, int]
) -> nn.Module:
    """Build the model with the weights of --resume, the average's with --use-ema."""
    model = build_model(args, num_classes, size)
    key = "model_ema" if args.use_ema else "model"
    if saved and not (isinstance(saved.get(key), dict) and saved[key]):
        raise InputError(f"{source}: no {key} in it; leave out --use-ema")
    if saved:
        weights = checkpoint.strip_prefixes(saved[key])
        if finetune.resample_pos_embed(model, weights, saved):
            print0(f"{source}: its position embedding is resampled for {size[0]}x{size[1]} pixels")
        was = checkpoint.plain(checkpoint.flags_of(saved).get("model"), 0)
        remedy = f"it is of --model {str(was)[:80]}" if was not in (None, args.model) else ""
        checkpoint.load_weights(model, weights, source, f"{key} weights", remedy)
        sizes = checkpoint.plain(checkpoint.flags_of(saved).get("input_size"), 1)
        if isinstance(sizes, list) and tuple((sizes * 2)[:2]) != size:
            print0(f"{source}: trained at {'x'.join(map(str, (sizes * 2)[:2]))} pixels; --input-size takes that")
    return model


def run_pictures(
    args: argparse.Namespace, saved: dict[str, Any], source: str, size: tuple[int, int], precision: engine.Precision
) -> None:
    """Write pictures of what the model looks at, on rank 0: whole, whatever the number of processes."""
    if not distributed.is_primary():
        return
    if args.image_dir:
        dataset = datasets.build_image_dataset(args, size)
        classes = saved.get("classes")
        num_classes = args.nb_classes or len(classes or ()) or count_head(args.model, saved.get("model", {}))
    else:
        dataset = datasets.build_val_dataset(args, size, saved.get("classes"))
        check_classes(saved, source, dataset.classes)
        classes, num_classes = dataset.classes, count_classes(args, dataset.classes)
    model = load_evaluated(args, saved, source, num_classes, size).to(precision.device)
    kind = checks.find_pictures(args)
    folder = Path(args.output_dir or ".") / "visualization"
    samples = datasets.spread(dataset, args.n_visualization)
    written = visualize.write_pictures(
        kind, model, samples, args.n_visualization, folder, classes, precision.autocast, precision.device
    )
    images = min(args.n_visualization, len(dataset))
    text = f"{len(written)} pictures of {images} images are in {folder}; open {written[-1]} first"
    print0(text if images == args.n_visualization else f"There are only {images} images. {text}")


if __name__ == "__main__":
    sys.exit(main())
