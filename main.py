"""One experiment: build data and model, then measure, evaluate or train. `python main.py --help` lists the flags."""

import argparse
import copy
import difflib
import math
import os
import random
import re
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

import datasets
import engine
from models.dhvt import DHVT
from util import checkpoint, distributed, options
from util.distributed import print0
from util.errors import InputError, NonFiniteLossError
from util.log import RunLog, describe_versions


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit status: 0, 2 for what the caller can mend, 1 for a diverged training."""
    try:
        args = options.parse(sys.argv[1:] if argv is None else argv)
        run(args, distributed.init(args.device, args.dist_backend))
    except (InputError, NonFiniteLossError) as error:
        line = (
            str(error).strip().splitlines()[-1].removeprefix("util.errors.InputError: ")
        )  # a loader's worker adds more
        where = f" [rank {distributed.rank()}]" if distributed.is_distributed() else ""
        print(f"main.py: error{where}: {line}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, InputError) else 1
    finally:
        distributed.shutdown()
    return 0


def run(args: argparse.Namespace, device: torch.device) -> None:
    for line in options.without_effect(args):
        print0(line)
    size = find_input_size(args)
    precision = engine.Precision(device, find_amp_dtype(args.amp, device))
    seed_everything(args.seed + distributed.rank())
    if args.only_test_speed:
        report_speed(args, build_model(args, args.nb_classes, size).to(device), size, precision)
        return
    check_output_dir(args)
    saved, source = load_checkpoint(args)
    if args.eval:
        run_evaluation(args, saved, source, size, precision)
    else:
        run_training(args, saved, source, size, precision)


def run_evaluation(
    args: argparse.Namespace, saved: dict[str, Any], source: str, size: tuple[int, int], precision: engine.Precision
) -> None:
    dataset = datasets.build_val_dataset(args, size, saved.get("classes"))
    check_classes(saved, source, dataset.classes)
    model = build_model(args, count_classes(args, dataset.classes), size)
    key = "model_ema" if args.use_ema else "model"
    if saved and not saved.get(key):
        raise InputError(f"{source}: no {key} in it; leave out --use-ema")
    if saved:
        checkpoint.load_weights(model, saved[key], source, f"{key} weights")
    model.to(precision.device)
    print0(f"Evaluating {args.model}, {'EMA' if args.use_ema else 'raw'} weights of {source or 'timm'}")
    if args.test_speed:
        report_speed(args, model, size, precision)
    test = engine.evaluate(model, datasets.build_val_loader(args, dataset), precision)
    print_accuracy(test)
    chance = 1 / model.num_classes
    if model.num_classes > 1 and test["acc1"] / 100 < chance + 2 * math.sqrt(chance * (1 - chance) / test["count"]):
        print0(
            f"This is chance for {model.num_classes} classes: is it the right checkpoint, and are the classes in order?"
        )


def run_training(
    args: argparse.Namespace, saved: dict[str, Any], source: str, size: tuple[int, int], precision: engine.Precision
) -> None:
    device = precision.device
    train_set = datasets.build_train_dataset(args, size)
    val_set = datasets.build_val_dataset(args, size, None)
    check_classes(saved, source, train_set.classes)
    num_classes = count_classes(args, train_set.classes)
    train_loader, val_loader = datasets.build_train_loader(args, train_set), datasets.build_val_loader(args, val_set)

    model = build_model(args, num_classes, size)
    model = synchronise_stem(model, device).to(device)
    ema = ModelEmaV3(model, args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)
    ema = ema if args.model_ema else None
    optimizer, scheduler, lr_sum = build_optimization(args, model, device)
    criterion, mixup = build_criterion(args, num_classes)
    state = {"model": model, "optimizer": optimizer, "model_ema": ema, "scaler": precision.scaler}
    progress = resume(args, saved, source, state)
    if progress["epoch"] + 1 >= args.epochs:
        print0(f"{source}: this run is finished ({progress['epoch'] + 1} epochs of {args.epochs}); nothing to do")
        return
    net = distributed.wrap_ddp(model, device)

    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    updates = math.ceil(len(train_loader) / args.accum_steps)
    announce(args, train_loader, val_set, n_parameters, lr_sum, updates)
    log = RunLog(Path(args.output_dir) if args.output_dir else None)
    start(log, args, progress["epoch"] + 1, lr_sum, n_parameters)
    if args.test_speed:
        report_speed(args, model, size, precision)

    started = time.time()
    step_options = engine.StepOptions(args.accum_steps, args.clip_grad, mixup, args.print_freq)
    for epoch in range(progress["epoch"] + 1, args.epochs):
        epoch_started = time.time()
        seed_everything(args.seed + distributed.rank(), epoch)
        train_loader.sampler.set_epoch(epoch)
        scheduler.step(epoch)
        step_options.on_report = partial(report_losses, log, epoch * updates, scheduler)
        train = engine.train_one_epoch(net, criterion, train_loader, optimizer, precision, epoch, step_options, ema)
        distributed.broadcast_buffers(model, ema and ema.module)
        test = {}
        if (epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs:
            test = evaluate_both(model, ema, val_loader, precision)
            log.scalars(epoch, test_acc1=test["test_acc1"], test_acc5=test["test_acc5"])
        best = test.get("test_acc1", -1.0) > progress["max_accuracy"]
        if best:
            progress |= {"max_accuracy": test["test_acc1"], "best_epoch": epoch}
        progress |= {
            "epoch": epoch,
            "max_accuracy_ema": max(progress["max_accuracy_ema"], test.get("test_ema_acc1", 0.0)),
        }
        if test:
            print0(f"Max accuracy: {progress['max_accuracy']:.2f}%")
        log.epoch(
            {k: train[k] for k in ("train_lr", "train_loss")}
            | test
            | {"epoch": epoch, "n_parameters": n_parameters, "images_per_s": train["images_per_s"]}
            | {"data_wait": train["data_wait"], "epoch_seconds": time.time() - epoch_started}
        )
        save(args, state, scheduler, progress, train_set.classes, best)
    log.close()
    close(args, progress, time.time() - started)


def find_input_size(args: argparse.Namespace) -> tuple[int, int]:
    """Give (height, width): --input-size, else the model's own. Raises InputError for an unknown model."""
    if not timm.is_model(args.model):
        near = difflib.get_close_matches(args.model, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise InputError(f"--model {args.model}: no such model; {hint}")
    if args.input_size is None:
        try:
            return tuple(timm.get_pretrained_cfg(args.model).input_size[-2:])
        except RuntimeError as error:
            raise InputError(f"--model {args.model}: {error} Leave out what follows the dot") from None
    return tuple(args.input_size * 2)[:2]


def find_amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Resolve --amp: auto is bf16 on CUDA where the device has it, else fp16; none on the CPU."""
    if amp == "auto":
        amp = "off" if device.type != "cuda" else "bf16" if distributed.bf16_supported(device) else "fp16"
    return {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[amp]


def seed_everything(seed: int, epoch: int | None = None) -> None:
    """Seed the main random streams; anew each epoch, so that a resumed run needs no saved state to go on alike."""
    entropy = (seed,) if epoch is None else (seed, epoch)
    a, b, c = np.random.SeedSequence(entropy).generate_state(3).tolist()
    random.seed(a)
    np.random.seed(b)
    torch.manual_seed(c)


def build_model(args: argparse.Namespace, num_classes: int | None, size: tuple[int, int]) -> nn.Module:
    """Create the model for `size` (height, width); models that take any size are not told it.

    --drop acts inside a transformer's blocks, as published; timm's drop_rate would be the classifier's.
    """
    kwargs: dict[str, Any] = {"img_size": size, "drop_path_rate": args.drop_path}
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if args.drop:
        kwargs |= {"pos_drop_rate": args.drop, "proj_drop_rate": args.drop}
    optional = {"img_size"} | ({"drop_path_rate"} if args.drop_path == 0.1 else set())
    kwargs |= args.model_kwargs
    while True:
        try:
            return timm.create_model(args.model, **kwargs)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or (name := unknown[1]) not in kwargs:
                raise InputError(f"--model {args.model}: {str(error).splitlines()[0]}") from None
            if name not in optional or name in args.model_kwargs:
                flags = {"drop_path_rate": "--drop-path", "pos_drop_rate": "--drop", "proj_drop_rate": "--drop"}
                flag = f"--model-kwargs {name}" if name in args.model_kwargs else flags[name]
                raise InputError(f"--model {args.model} takes no {name}: leave out {flag}") from None
            del kwargs[name]
        except (AssertionError, ValueError, RuntimeError, ArithmeticError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            given = "".join(f" {k}={v}" for k, v in args.model_kwargs.items())
            given = f" with --model-kwargs{given}" if given else ""
            raise InputError(f"--model {args.model} at {size[0]}x{size[1]} pixels{given}: {reason}") from None


def synchronise_stem(model: nn.Module, device: torch.device) -> nn.Module:
    """Synchronise the norms of DHVT's SOPE over the processes, as published; torch can on accelerators only."""
    if isinstance(model, DHVT) and distributed.is_distributed():
        if device.type == "cpu":
            print0("SOPE's batch norms stay local to each process: torch has no synchronised norm for the CPU")
        else:
            model.patch_embed = nn.SyncBatchNorm.convert_sync_batchnorm(model.patch_embed)
    return model


def build_optimization(
    args: argparse.Namespace, model: nn.Module, device: torch.device
) -> tuple[torch.optim.Optimizer, Scheduler, dict[str, Any]]:
    """Create optimizer and schedule. The third value tells the effective batch and rate, and how they came about."""
    world = distributed.world_size()
    batch = args.batch_size * world * args.accum_steps
    lr = args.lr if args.unscale_lr else args.lr * batch / 512
    kwargs = {"fused": True} if device.type == "cuda" and args.opt.lower() in ("adam", "adamw") else {}
    kwargs |= {} if args.opt_betas is None else {"betas": args.opt_betas}
    try:
        optimizer = create_optimizer_v2(
            model, args.opt, lr, args.weight_decay, args.momentum, eps=args.opt_eps, **kwargs
        )
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise InputError(
            f"--opt {args.opt}: {str(error).splitlines()[0]}; timm.optim.list_optimizers() has them"
        ) from None
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            args.sched,
            num_epochs=args.epochs,
            decay_epochs=args.decay_epochs,
            decay_milestones=[args.decay_epochs],
            decay_rate=args.decay_rate,
            min_lr=args.min_lr,
            warmup_lr=args.warmup_lr,
            warmup_epochs=args.warmup_epochs,
            noise=args.lr_noise,
            noise_pct=args.lr_noise_pct,
            noise_std=args.lr_noise_std,
            noise_seed=args.seed,
        )
    except (ValueError, AssertionError) as error:
        raise InputError(f"--sched {args.sched}: {str(error).splitlines()[0]}") from None
    rule = "as given by --unscale-lr" if args.unscale_lr else f"{args.lr:g} x {batch} / 512"
    text = (
        f"effective batch {batch} = {args.batch_size} a process x {world} process(es) x {args.accum_steps} accumulated"
        f"; learning rate {lr:g} = {rule}"
    )
    return optimizer, scheduler, {"effective_batch": batch, "effective_lr": lr, "text": text}


def build_criterion(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, Mixup | None]:
    mixup = None
    if options.mixup_active(args):
        mixup = Mixup(
            args.mixup,
            args.cutmix,
            args.cutmix_minmax,
            args.mixup_prob,
            args.mixup_switch_prob,
            args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
    if args.bce_loss:
        return BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0), mixup
    return nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else args.smoothing), mixup


def count_classes(args: argparse.Namespace, classes: Sequence[str]) -> int:
    if args.nb_classes is not None and args.nb_classes < len(classes):
        raise InputError(
            f"--nb-classes {args.nb_classes} is less than the {len(classes)} classes of the data (class "
            f"{args.nb_classes} is {classes[args.nb_classes]}): leave it out"
        )
    return args.nb_classes or len(classes)


def check_classes(saved: dict[str, Any], source: str, classes: Sequence[str]) -> None:
    """Refuse a checkpoint of other classes than the data's, by name and number."""
    theirs = saved.get("classes")
    if theirs is None or list(theirs) == list(classes):
        return
    if len(theirs) != len(classes):
        raise InputError(f"{source}: it has {len(theirs)} classes, and the data {len(classes)}: is --data-path right?")
    i = next(i for i, (a, b) in enumerate(zip(theirs, classes, strict=True)) if a != b)
    raise InputError(f"{source}: its class {i} is {theirs[i]}, and the data's is {classes[i]}: is --data-path right?")


def check_output_dir(args: argparse.Namespace) -> None:
    """Refuse a folder that cannot be written, and one that holds another run: training would overwrite it."""
    if not args.output_dir:
        return
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: it is a file; name a folder")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--output_dir {folder}: {parent} cannot be written; name another folder")
    if args.eval or args.resume == "auto" or not checkpoint.find_all(folder):
        return
    if not args.resume or Path(args.resume).resolve().parent != folder.resolve():
        raise InputError(f"--output_dir {folder}: it holds a run; continue it by --resume auto, or name another folder")


def load_checkpoint(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Read --resume on every process; rank 0 chooses what `auto` means. Returns ({}, "") where there is nothing."""
    source = args.resume
    if source == "auto":
        source, found = distributed.broadcast_object(choose_newest(Path(args.output_dir)))
        if not source and found:
            raise InputError(
                f"--resume auto: none of the {found} checkpoints in {args.output_dir} can be read; name another folder"
            )
        if not source and args.eval:
            raise InputError(f"--resume auto: no checkpoint in {args.output_dir} to evaluate; name another folder")
        print0(f"--resume auto: {source or f'no checkpoint in {args.output_dir}, starting afresh'}")
    return (checkpoint.load(source), source) if source else ({}, "")


def choose_newest(folder: Path) -> tuple[str, int]:
    paths = checkpoint.find_all(folder) if distributed.is_primary() else []
    for path in paths:
        try:
            checkpoint.load(path)
            return str(path), len(paths)
        except InputError as error:
            print0(f"--resume auto: passed over {error}")
    return "", len(paths)


def resume(args: argparse.Namespace, saved: dict[str, Any], source: str, state: dict[str, Any]) -> dict[str, Any]:
    """Restore what `save` wrote; returns how far the run is. Rates follow today's flags, and what changed is said."""
    progress = {"epoch": args.start_epoch - 1, "max_accuracy": 0.0, "max_accuracy_ema": 0.0, "best_epoch": None}
    if not saved:
        return progress
    if "optimizer" not in saved:
        raise InputError(f"{source}: weights only, so there is no run to resume; --eval evaluates it")
    checkpoint.load_weights(state["model"], saved["model"], source)
    checkpoint.load_optimizer(state["optimizer"], saved["optimizer"], source)
    if saved.get("scaler") and state["scaler"].is_enabled():
        state["scaler"].load_state_dict(saved["scaler"])
    if state["model_ema"] is not None:
        if saved.get("model_ema"):
            checkpoint.load_weights(state["model_ema"].module, saved["model_ema"], source, "EMA weights")
        else:
            checkpoint.load_weights(state["model_ema"].module, saved["model"], source)
            print0(f"{source}: no EMA in it; the average starts from the loaded weights")
    progress |= {k: saved[k] for k in progress if saved.get(k) is not None}
    before = saved.get("args", {})
    before = vars(before) if isinstance(before, argparse.Namespace) else before
    for name, now in checkpoint.plain(vars(args)).items():
        then = checkpoint.plain(before.get(name, now))
        if then != now and name not in ("resume", "output_dir", "device", "eval", "num_workers", "print_freq"):
            print0(f"resume: --{name} was {then} and is {now} from here on")
    return progress


def save(
    args: argparse.Namespace,
    state: dict[str, Any],
    scheduler: Scheduler,
    progress: dict[str, Any],
    classes: Sequence[str],
    best: bool,
) -> None:
    if not args.output_dir or not distributed.is_primary():
        return
    ema, scaler = state["model_ema"], state["scaler"]
    content = {
        "model": state["model"].state_dict(),
        "optimizer": state["optimizer"].state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "model_ema": None if ema is None else ema.module.state_dict(),
        "scaler": scaler.state_dict() if scaler.is_enabled() else None,
        "args": checkpoint.plain(vars(args)),
        "classes": list(classes),
        **progress,
    }
    checkpoint.save(content, Path(args.output_dir), args.keep_checkpoints, best)


def announce(args, train_loader, val_set, n_parameters: int, lr_sum: dict[str, Any], updates: int) -> None:
    """Say what will be trained on what, and what may surprise."""
    n, sampler = len(train_loader.dataset), train_loader.sampler
    print0(f"Model {args.model}; number of params: {n_parameters}")
    print0(lr_sum["text"])
    distinct = sampler.distinct_images(n, args.batch_size)
    print0(
        f"{n} training and {len(val_set)} test images; an epoch of {updates} updates shows {distinct} distinct images"
        + (" (--repeated-aug)" if args.repeated_aug else "")
    )
    left = args.model_ema_decay ** (updates * args.epochs)
    if args.model_ema and left > 0.1:
        print0(
            f"EMA: {left:.0%} of the initial weights will remain in the average; lower --model-ema-decay to forget them"
        )


def start(log: RunLog, args: argparse.Namespace, start_epoch: int, lr_sum: dict[str, Any], n_parameters: int) -> None:
    """Write what is known before the first step; nothing was written before this."""
    record = checkpoint.plain(vars(args)) | {k: v for k, v in lr_sum.items() if k != "text"}
    record |= {"n_parameters": n_parameters, "processes": distributed.world_size(), "versions": describe_versions()}
    try:
        log.start(record, start_epoch)
    except OSError as error:
        raise InputError(f"--output_dir {args.output_dir}: {error}") from None
    distributed.barrier()


def report_losses(log: RunLog, first_step: int, scheduler: Scheduler, update: int, losses: list[float]) -> None:
    lr = max(group["lr"] for group in scheduler.optimizer.param_groups)
    for i, loss in enumerate(losses):
        log.scalars(first_step + update + i, loss=loss, lr=lr)


def evaluate_both(model: nn.Module, ema: ModelEmaV3 | None, loader, precision: engine.Precision) -> dict[str, float]:
    """Evaluate the raw weights, then the average where there is one; keys as in log.txt."""
    test = engine.evaluate(model, loader, precision)
    print_accuracy(test)
    line = {f"test_{k}": test[k] for k in ("loss", "acc1", "acc5", "topk")}
    if ema is not None:
        average = ema.module
        if next(average.parameters()).device != precision.device:  # --model-ema-force-cpu
            average = copy.deepcopy(average).to(precision.device)
        test = engine.evaluate(average, loader, precision)
        print0(f"EMA: Acc@1 {test['acc1']:.3f} loss {test['loss']:.3f}")
        line |= {f"test_ema_{k}": test[k] for k in ("loss", "acc1", "acc5")}
    return line


def print_accuracy(test: dict[str, float]) -> None:
    print0(f"* Acc@1 {test['acc1']:.3f} Acc@{test['topk']} {test['acc5']:.3f} loss {test['loss']:.3f}")
    print0(f"Accuracy of the network on the {test['count']} test images: {test['acc1']:.1f}%")


def report_speed(
    args: argparse.Namespace, model: nn.Module, size: tuple[int, int], precision: engine.Precision
) -> None:
    """Print throughput and MACs, on rank 0; under --output_dir they go to speed_macs.txt too."""
    if not distributed.is_primary():
        return
    lines = [f"{args.model}: {engine.count_macs(model, size):.3f} GMACs (1 MAC = 2 FLOPs) at {size[0]}x{size[1]}"]
    print0(lines[0])
    for train in (False, True):
        found = engine.benchmark(model, size, args.batch_size, precision, train)
        lines.append(
            f"{found['mode']}: {found['images_per_s']:.1f} images/s ({found['ms_per_batch']:.1f} ms a batch of "
            f"{found['batch_size']}, spread {found['spread']:.1f} %), {found['precision']}, peak memory "
            f"{found['peak_memory_mib']:.0f} MiB, {found['device']}, torch {found['torch']}"
        )
        print0(lines[-1])
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomic(folder / "speed_macs.txt", ("\n".join(lines) + "\n").encode())


def close(args: argparse.Namespace, progress: dict[str, Any], seconds: float) -> None:
    """Say how good it got, where that is, and how to see it again."""
    ema = f"; EMA {progress['max_accuracy_ema']:.2f}%" if args.model_ema else ""
    print0(f"Trained for {timedelta(seconds=round(seconds))}")
    text = f"Best accuracy {progress['max_accuracy']:.2f}% (epoch {progress['best_epoch']}{ema})"
    if not args.output_dir:
        print0(f"{text}; nothing was saved: no --output_dir")
        return
    best = Path(args.output_dir) / "best_checkpoint.pth"
    command = ["python", "main.py", "--eval", "--resume", str(best), "--model", args.model, "--data-set", args.data_set]
    command += ["--data-path", args.data_path] if args.data_path else []
    command += ["--use-lmdb"] if args.use_lmdb else []
    command += ["--input-size", *map(str, args.input_size)] if args.input_size else []
    command += ["--nb-classes", str(args.nb_classes)] if args.nb_classes else []
    command += ["--model-kwargs", *(f"{k}={v}" for k, v in args.model_kwargs.items())] if args.model_kwargs else []
    command += ["--eval-crop-ratio", str(args.eval_crop_ratio)] if args.eval_crop_ratio != 0.875 else []
    print0(f"{text}, in {best}; evaluate it with: {shlex.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
