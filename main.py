"""One experiment: build data and model, then measure, evaluate or train. `python main.py --help` lists the flags."""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.data import DataLoader

import datasets
import engine
from builders import (
    build_criterion,
    build_keep_rate,
    build_model,
    build_optimization,
    count_head,
    find_amp_dtype,
    find_input_size,
    load_finetuned,
    load_teacher,
    seed_everything,
    speed_up,
    synchronise_stem,
)
from losses import DistillationLoss, ImageLoss
from util import checkpoint, checks, distributed, finetune, options, visualize
from util.distributed import print0
from util.errors import InputError, NonFiniteLossError
from util.log import RunLog, describe_versions
from util.report import announce, close, describe_speed, print_accuracy
from util.run_state import RunState, check_output_dir, load_resumed, lock, unlock


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit status: 0, 2 for what the caller can mend, 1 for a diverged training."""
    try:
        args = options.parse(sys.argv[1:] if argv is None else argv)
        run(args, distributed.init(args.device, args.dist_backend))
    except (InputError, NonFiniteLossError) as error:
        line = str(error).strip().splitlines()[-1]  # what comes from a loader's worker has its traceback before it
        line = line.removeprefix("util.errors.InputError: ")
        where = f" [rank {distributed.rank()}]" if distributed.is_distributed() else ""
        print(f"main.py: error{where}: {line}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("main.py: stopped; --resume auto goes on after the last finished epoch", file=sys.stderr, flush=True)
        return 130
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, TorchDynamoException):
            print(f"main.py: error: --compile: {reason}; leave it out", file=sys.stderr, flush=True)
            return 2
        if "DataLoader worker" in reason:
            line = f"{reason} Out of memory? Try fewer --num_workers, or in a container a larger --shm-size"
        elif distributed.is_lost_connection(error):
            line = f"rank {distributed.rank()} lost the others: one of them ended, and has said why"
        else:
            raise
        print(f"main.py: error: {line}", file=sys.stderr, flush=True)
        return 1
    finally:
        unlock()
        distributed.shutdown()
    return 0


def run(args: argparse.Namespace, device: torch.device) -> None:
    for line in options.without_effect(args):
        print0(line)
    size = find_input_size(args)
    precision = engine.Precision(device, find_amp_dtype(args.amp, device), args.channels_last)
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
    else:
        run_training(args, saved, source, size, precision)


def run_evaluation(
    args: argparse.Namespace, saved: dict[str, Any], source: str, size: tuple[int, int], precision: engine.Precision
) -> None:
    dataset = datasets.build_val_dataset(args, size, saved.get("classes"))
    check_classes(saved, source, dataset.classes)
    model = load_evaluated(args, saved, source, count_classes(args, dataset.classes), size).to(precision.device)
    print0(f"Evaluating {args.model}, {'EMA' if args.use_ema else 'raw'} weights of {source or 'timm'}")
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
        checkpoint.load_weights(model, weights, source, f"{key} weights")
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


def run_training(
    args: argparse.Namespace, saved: dict[str, Any], source: str, size: tuple[int, int], precision: engine.Precision
) -> None:
    device = precision.device
    start_weights = load_start(args, source)
    teacher, taught = load_teacher(args, size)
    train_set = datasets.build_train_dataset(args, size)
    val_set = datasets.build_val_dataset(args, size, None)
    check_classes(saved, source, train_set.classes, "is --data-path right, or did you mean --finetune?")
    num_classes = count_classes(args, train_set.classes)
    check_teacher(args, teacher, taught, train_set.classes, num_classes)
    train_loader, val_loader = datasets.build_train_loader(args, train_set), datasets.build_val_loader(args, val_set)

    model, frozen = start_model(args, num_classes, size, start_weights, device)
    distributed.broadcast_state(model)  # the average starts from the same weights on every process
    ema_device = torch.device("cpu") if args.model_ema_force_cpu else None
    ema = ModelEmaV3(model, args.model_ema_decay, device=ema_device) if args.model_ema else None
    optimizer, scheduler, lr_sum = build_optimization(args, model, device)
    criterion, mixup = build_criterion(args, num_classes)
    state = RunState(model, ema, optimizer, scheduler, precision.scaler, train_set.classes)
    if saved:
        state.restore(saved, source, args)
    first_epoch = state.progress.epoch + 1
    if first_epoch >= args.epochs:
        print0(f"{source}: this run is finished ({first_epoch} epochs of {args.epochs}); nothing to do")
        return

    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    updates = math.ceil(len(train_loader) / args.accum_steps)
    announce(args, train_loader, val_set, n_parameters, lr_sum, updates)
    log = RunLog(Path(args.output_dir) if args.output_dir else None)
    start(log, args, first_epoch, lr_sum, n_parameters)
    if args.test_speed:
        report_speed(args, model, size, precision)

    criterion = build_image_loss(args, criterion, model, teacher, precision)
    step_options = engine.StepOptions(
        args.accum_steps,
        args.clip_grad,
        mixup,
        args.print_freq,
        train_mode=args.train_mode,
        frozen=frozen,
        remode=args.remode,
    )
    started = time.time()
    train_epochs(args, state, train_loader, val_loader, precision, criterion, step_options, log, n_parameters)
    log.close()
    close(args, state.progress, time.time() - started)


def train_epochs(
    args: argparse.Namespace,
    state: RunState,
    train_loader: DataLoader,
    val_loader: DataLoader,
    precision: engine.Precision,
    criterion: nn.Module,
    step_options: engine.StepOptions,
    log: RunLog,
    n_parameters: int,
) -> None:
    """Train, evaluate, log and save each epoch that is left."""
    model, ema, progress = state.model, state.ema, state.progress
    if args.compile:
        model.compile()
        if ema is not None:
            ema.module.compile()
    net = distributed.wrap_ddp(model, precision.device)
    updates = math.ceil(len(train_loader) / args.accum_steps)
    keep_rate_of = build_keep_rate(args, updates)
    for epoch in range(progress.epoch + 1, args.epochs):
        epoch_started = time.time()
        seed_everything(args.seed + distributed.rank(), epoch)
        train_loader.sampler.set_epoch(epoch)
        state.scheduler.step(epoch)
        step_options.on_report = partial(report_losses, log, epoch * updates, state.scheduler, keep_rate_of)
        if keep_rate_of is not None:
            step_options.keep_rate = lambda update, first=epoch * updates: keep_rate_of(first + update)
        last_rate = None if keep_rate_of is None else keep_rate_of((epoch + 1) * updates - 1)
        train = engine.train_one_epoch(
            net, criterion, train_loader, state.optimizer, precision, epoch, step_options, ema
        )
        distributed.broadcast_buffers(model, ema and ema.module)
        test: dict[str, float] = {}
        try:
            if (epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs:
                test |= evaluate_both(model, ema, val_loader, precision, last_rate)
        finally:  # an image that cannot be read costs the evaluation, not the epoch
            best = progress.record(epoch, test, last_rate)
            more = {} if last_rate is None else {"keep_rate": last_rate}
            more |= {"epoch": epoch, "n_parameters": n_parameters, "epoch_seconds": time.time() - epoch_started}
            log.epoch(train, test, **more)
            state.save(args, best)
        if test:
            at = "" if last_rate is None else f" at keep rate {progress.best_keep_rate:g}"
            print0(f"Max accuracy: {progress.max_accuracy:.2f}%{at}")


def load_start(args: argparse.Namespace, source: str) -> dict[str, Any]:
    """Read --finetune; a run that is resumed has its weights already, and is named by `source`."""
    if args.finetune and source:
        print0(f"{source} is resumed: --finetune {args.finetune} was where it began, and is not read again")
    return checkpoint.load(args.finetune) if args.finetune and not source else {}


def start_model(
    args: argparse.Namespace,
    num_classes: int,
    size: tuple[int, int],
    start_weights: dict[str, Any],
    device: torch.device,
) -> tuple[nn.Module, list[nn.Module]]:
    """Build the model as training begins with it, and list the frozen norms."""
    model = build_model(args, num_classes, size)
    load_finetuned(args, model, start_weights)
    model = speed_up(args, synchronise_stem(model, device).to(device))
    return model, finetune.freeze(model, args.freeze)


def count_classes(args: argparse.Namespace, classes: Sequence[str]) -> int:
    if args.nb_classes is not None and args.nb_classes < len(classes):
        raise InputError(
            f"--nb-classes {args.nb_classes} is less than the {len(classes)} classes of the data (class "
            f"{args.nb_classes} is {classes[args.nb_classes]}): leave it out"
        )
    return args.nb_classes or len(classes)


def check_classes(
    saved: dict[str, Any], source: str, classes: Sequence[str], remedy: str = "is --data-path right?"
) -> None:
    """Refuse a checkpoint of other classes than the data's, by name and number."""
    theirs = saved.get("classes")
    if theirs is None or list(theirs) == list(classes):
        return
    if len(theirs) != len(classes):
        raise InputError(f"{source}: it has {len(theirs)} classes, and the data {len(classes)}: {remedy}")
    i = next(i for i, (a, b) in enumerate(zip(theirs, classes, strict=True)) if a != b)
    raise InputError(f"{source}: its class {i} is {theirs[i]}, and the data's is {classes[i]}: {remedy}")


def check_teacher(
    args: argparse.Namespace,
    teacher: nn.Module | None,
    taught: Sequence[str] | None,
    classes: Sequence[str],
    num_classes: int,
) -> None:
    """Refuse a teacher of other classes than the student's: by number, and by name where its file has them (`taught`).

    It would teach all the same, and nonsense.
    """
    if teacher is None:
        return
    if teacher.num_classes != num_classes:
        ours = f"the data {num_classes}" if args.nb_classes is None else f"--nb-classes says {num_classes}"
        raise InputError(
            f"--teacher-path {args.teacher_path}: the teacher has {teacher.num_classes} classes, and {ours}: "
            "give one trained on these classes"
        )
    check_classes({"classes": taught}, f"--teacher-path {args.teacher_path}", classes)


def build_image_loss(
    args: argparse.Namespace,
    loss: nn.Module,
    model: nn.Module,
    teacher: nn.Module | None,
    precision: engine.Precision,
) -> nn.Module:
    """Make the loop's criterion of `loss`; with a teacher, have the model train both heads, and say who teaches."""
    if teacher is None:
        return ImageLoss(loss)
    model.set_distilled_training(True)
    kind, alpha, tau = args.distillation_type, args.distillation_alpha, args.distillation_tau
    n = sum(p.numel() for p in teacher.parameters())
    print0(f"Teacher {args.teacher_model}, {n} parameters; {kind} distillation, alpha {alpha:g}, tau {tau:g}")
    return DistillationLoss(loss, teacher.to(precision.device), kind, alpha, tau, precision.autocast)


def start(log: RunLog, args: argparse.Namespace, start_epoch: int, lr_sum: dict[str, Any], n_parameters: int) -> None:
    """Write what is known before the first step; nothing was written before this."""
    record = checkpoint.plain(vars(args)) | {k: v for k, v in lr_sum.items() if k != "text"}
    record |= {"n_parameters": n_parameters, "processes": distributed.world_size(), "versions": describe_versions()}
    try:
        log.start(record, start_epoch)
        if log.folder is not None:
            lock(log.folder)
    except OSError as error:
        raise InputError(f"--output_dir {args.output_dir}: {error}") from None
    distributed.barrier()


def report_losses(
    log: RunLog,
    first_step: int,
    scheduler: Scheduler,
    keep_rate_of: Callable[[int], float] | None,
    update: int,
    losses: list[float],
) -> None:
    lr = max(group["lr"] for group in scheduler.optimizer.param_groups)
    for step, loss in enumerate(losses, first_step + update):
        more = {} if keep_rate_of is None else {"keep_rate": keep_rate_of(step)}
        log.scalars(step, loss=loss, lr=lr, **more)


def evaluate_both(
    model: nn.Module, ema: ModelEmaV3 | None, loader: DataLoader, precision: engine.Precision, keep_rate: float | None
) -> dict[str, float]:
    """Evaluate the raw weights, then the average where there is one; keys as in log.txt."""
    test = engine.evaluate(model, loader, precision, keep_rate)
    print_accuracy(test)
    line = {f"test_{k}": test[k] for k in ("loss", "acc1", "acc5", "topk")}
    if ema is not None:
        average = ema.module
        if next(average.parameters()).device != precision.device:  # --model-ema-force-cpu
            average = copy.deepcopy(average).to(precision.device)
        test = engine.evaluate(average, loader, precision, keep_rate)
        print0(f"EMA: Acc@1 {test['acc1']:.3f} loss {test['loss']:.3f}")
        line |= {f"test_ema_{k}": test[k] for k in ("loss", "acc1", "acc5")}
    return line


def report_speed(
    args: argparse.Namespace, model: nn.Module, size: tuple[int, int], precision: engine.Precision
) -> None:
    """Print throughput and MACs, on rank 0; under --output_dir they go to speed_macs.txt too."""
    if not distributed.is_primary():
        return
    gmacs = engine.count_macs(model, size)
    lines = [f"{args.model}: {gmacs:.3f} GMACs (1 MAC = 2 FLOPs) at {size[0]}x{size[1]}"]
    print0(lines[0])
    batch = args.speed_batch_size or args.batch_size
    for train in (False, True):
        found = engine.benchmark(model, size, batch, precision, train, compiled=args.compile, gmacs=gmacs)
        lines.append(describe_speed(found))
        print0(lines[-1])
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomic(folder / "speed_macs.txt", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
