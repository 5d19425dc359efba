"""A training run: from flags and data to the last checkpoint, or to where a signal stops it."""

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

import datasets
import engine
from builders import (
    build_criterion,
    build_keep_rate,
    build_model,
    build_optimization,
    check_classes,
    count_classes,
    load_finetuned,
    load_teacher,
    seed_everything,
    speed_up,
    synchronise_stem,
)
from losses import DistillationLoss, ImageLoss
from util import checkpoint, distributed, finetune
from util.distributed import print0
from util.errors import InputError, PreemptedError
from util.log import RunLog, describe_versions
from util.position import Position, capture, set_random_states
from util.preemption import STOP, Preemption
from util.report import announce, close, print_accuracy, report_speed
from util.run_state import RunState, check_room, lock


@dataclass
class Run:
    """What the epochs need; `state` is all of it that they change."""

    args: argparse.Namespace
    state: RunState
    train_loader: DataLoader
    val_loader: DataLoader
    precision: engine.Precision
    criterion: nn.Module
    options: engine.StepOptions
    log: RunLog
    n_parameters: int

    @property
    def updates(self) -> int:
        """Count an epoch's updates."""
        return math.ceil(len(self.train_loader) / self.args.accum_steps)


def train(
    args: argparse.Namespace,
    saved: dict[str, Any],
    source: str,
    size: tuple[int, int],
    precision: engine.Precision,
    preemption: Preemption | None,
) -> None:
    """Train from where `saved`, the content of `source`, leaves off, or from the beginning where it is empty."""
    start_weights = load_start(args, source)
    teacher, taught = load_teacher(args, size)
    train_set, val_set = datasets.build_train_dataset(args, size), datasets.build_val_dataset(args, size, None)
    check_classes(saved, source, train_set.classes, "is --data-path right, or did you mean --finetune?")
    num_classes = count_classes(args, train_set.classes)
    check_teacher(args, teacher, taught, train_set.classes, num_classes)
    train_loader, val_loader = datasets.build_train_loader(args, train_set), datasets.build_val_loader(args, val_set)

    model, frozen = start_model(args, num_classes, size, start_weights, precision.device)
    distributed.broadcast_state(model)  # the average starts from the same weights on every process
    ema_device = torch.device("cpu") if args.model_ema_force_cpu else None
    ema = ModelEmaV3(model, args.model_ema_decay, device=ema_device) if args.model_ema else None
    optimizer, scheduler, lr_sum = build_optimization(args, model, precision.device)
    criterion, mixup = build_criterion(args, num_classes)
    state = RunState(model, ema, optimizer, scheduler, precision.scaler, train_set.classes)
    log = RunLog(Path(args.output_dir) if args.output_dir else None)
    if saved:
        state.restore(saved, source, args)
    if state.progress.epoch + 1 >= args.epochs:
        print0(f"{source}: this run is finished ({state.progress.epoch + 1} epochs of {args.epochs}); nothing to do")
        if log.folder is not None and not (log.folder / "curves.png").exists():
            log.draw()  # it was stopped before that
        return

    options = engine.StepOptions(
        args.accum_steps, args.clip_grad, mixup, args.print_freq, train_mode=args.train_mode, frozen=frozen,
        remode=args.remode,
    )  # fmt: skip
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run = Run(args, state, train_loader, val_loader, precision, criterion, options, log, n_parameters)
    options.position = state.restore_position(saved, source, args, run.updates, precision.device)
    announce(args, train_loader, val_set, n_parameters, lr_sum, run.updates)
    start(run, source, lr_sum)
    if args.test_speed:
        report_speed(args, model, size, precision)
    run.criterion = build_image_loss(args, criterion, model, teacher, precision)  # from here on both heads train
    started = time.time()
    train_epochs(run, preemption)
    log.close()
    close(args, state.progress, time.time() - started)


def train_epochs(run: Run, preemption: Preemption | None) -> None:
    """Train, evaluate, log and save each epoch that is left.

    Where a signal asks for it, the run ends after an update or between two batches of an evaluation, once all that it
    takes to go on from there is saved. Raises PreemptedError then.
    """
    args, state, options, progress = run.args, run.state, run.options, run.state.progress
    model, ema = state.model, state.ema
    if args.compile:
        model.compile()
        if ema is not None:
            ema.module.compile()
    net = distributed.wrap_ddp(model, run.precision.device)
    keep_rate_of = build_keep_rate(args, run.updates)
    options.keep = partial(keep, run, preemption)
    if preemption is not None:
        options.due, preemption.deferring = preemption.due, True
    try:
        for epoch in range(progress.epoch + 1, args.epochs):
            begin_epoch(run, epoch, keep_rate_of)
            train = engine.train_one_epoch(
                net, run.criterion, run.train_loader, state.optimizer, run.precision, epoch, options, ema
            )
            distributed.broadcast_buffers(model, ema and ema.module)
            finish_epoch(run, epoch, train, options.keep_rate and options.keep_rate(run.updates - 1))
            options.position = Position()
            if preemption is not None:
                preemption.saved()
            if epoch + 1 < args.epochs and options.due() == STOP:
                raise PreemptedError(f"after epoch {epoch}")
    except PreemptedError as error:
        raise PreemptedError(
            f"stopped by {preemption.name} {error}; it is saved, and the same command with --resume auto goes on there"
        ) from None


def begin_epoch(run: Run, epoch: int, keep_rate_of: Callable[[int], float] | None) -> None:
    """Set rate, random streams and order of the images, as they are at the position where the epoch begins."""
    options, state, position = run.options, run.state, run.options.position
    first = epoch * run.updates
    seed_everything(run.args.seed + distributed.rank(), epoch)
    run.train_loader.sampler.set_epoch(epoch, position.update * run.args.accum_steps * run.args.batch_size)
    state.scheduler.step(epoch)
    if position.own is not None:
        set_random_states(position.own, run.precision.device)
    options.on_report = partial(report_losses, run.log, first, state.scheduler, keep_rate_of)
    if keep_rate_of is not None:
        options.keep_rate = lambda update: keep_rate_of(first + update)


def finish_epoch(run: Run, epoch: int, train: dict[str, float], last_rate: float | None) -> None:
    """Evaluate an epoch's weights, log and save it."""
    args, state, progress, options = run.args, run.state, run.state.progress, run.options
    started = time.time()
    test: dict[str, float] = {}
    try:
        if (epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs:
            test |= evaluate_both(state.model, state.ema, run.val_loader, run.precision, last_rate, options.due)
    except BaseException as error:  # the epoch is not lost with its evaluation
        run.state.save(args, False, run.state.describe(args, options.position, run.updates))
        if isinstance(error, PreemptedError):
            raise PreemptedError(f"in the evaluation of epoch {epoch}") from None
        raise
    log_and_save(run, epoch, train, test, last_rate, started)
    if test:
        at = "" if last_rate is None else f" at keep rate {progress.best_keep_rate:g}"
        print0(f"Max accuracy: {progress.max_accuracy:.2f}%{at}")


def log_and_save(
    run: Run, epoch: int, train: dict[str, float], test: dict[str, float], last_rate: float | None, started: float
) -> None:
    best = run.state.progress.record(epoch, test, last_rate)
    more = {} if last_rate is None else {"keep_rate": last_rate}
    more |= {} if run.args.on_bad_image == "error" else {"bad_images": count_skipped(run.train_loader)}
    seconds = run.options.position.seconds + time.time() - started
    run.log.epoch(train, test, **more, epoch=epoch, n_parameters=run.n_parameters, epoch_seconds=seconds)
    run.state.save(run.args, best)


def count_skipped(loader: DataLoader) -> int:
    """Count the images of the epoch, in all processes, that could not be read; since the run was last resumed."""
    count = distributed.total(loader.dataset.skipped.take())
    if count:
        print0(f"{count} images could not be read, and others were trained on in their places (--on-bad-image skip)")
    return count


def keep(run: Run, preemption: Preemption | None) -> None:
    """Save the run as it is in the middle of an epoch."""
    ranks = capture(run.precision.device)
    run.state.save(run.args, False, run.state.describe(run.args, run.options.position, run.updates, ranks))
    if preemption is not None:
        preemption.saved()


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


def start(run: Run, source: str, lr_sum: dict[str, Any]) -> None:
    """Write what is known before the first step; nothing was written before this."""
    record = checkpoint.plain(vars(run.args)) | {k: v for k, v in lr_sum.items() if k != "text"}
    record |= {"n_parameters": run.n_parameters, "processes": distributed.world_size(), "versions": describe_versions()}
    check_room(run.args, run.state)
    run.log.start(record, run.state.progress.epoch + 1)
    if run.log.folder is not None:
        lock(run.log.folder)
        with checkpoint.writing(run.log.folder):
            run.state.mend(run.log.folder, Path(source))
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
    model: nn.Module,
    ema: ModelEmaV3 | None,
    loader: DataLoader,
    precision: engine.Precision,
    keep_rate: float | None,
    due: Callable[[], int],
) -> dict[str, float]:
    """Evaluate the raw weights, then the average where there is one; keys as in log.txt."""
    test = engine.evaluate(model, loader, precision, keep_rate, due)
    print_accuracy(test)
    line = {f"test_{k}": test[k] for k in ("loss", "acc1", "acc5", "topk")}
    if ema is not None:
        average = ema.module
        if next(average.parameters()).device != precision.device:  # --model-ema-force-cpu
            average = copy.deepcopy(average).to(precision.device)
        test = engine.evaluate(average, loader, precision, keep_rate, due)
        print0(f"EMA: Acc@1 {test['acc1']:.3f} loss {test['loss']:.3f}")
        line |= {f"test_ema_{k}": test[k] for k in ("loss", "acc1", "acc5")}
    return line
