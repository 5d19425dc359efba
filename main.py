"""Train, evaluate, measure or visualize a model: python main.py --help lists the flags.

Each is one function, top to bottom. The command line follows DeiT's (https://github.com/facebookresearch/deit),
EViT's (https://github.com/youweiliang/evit) and DHVT's (https://github.com/ArieSeirack/DHVT).
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from timm.data import Mixup
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs
from timm.utils import ModelEmaV3, reparameterize_model
from torch import nn
from torch.utils.data import DataLoader

import datasets
import engine
from data.transforms import DeviceTransform
from losses import DistillationLoss, ImageLoss
from models import build
from models.dhvt import DHVT
from util import data_options, distributed, log, optim, options, report, visualize, weights
from util.checkpoint import TrainState, check_output_dir, resolve_resume, resume_after_restart
from util.command import run_command
from util.config import DataConfig, ModelConfig, describe_size
from util.distributed import print0
from util.errors import InputError
from util.precision import DTYPES, Precision, resolve_amp
from util.stop_signal import StopSignal


def train(args: argparse.Namespace, precision: Precision, stop: StopSignal | None) -> None:
    """Train a model from the beginning, from other weights (--finetune) or from a checkpoint (--resume)."""
    resume = resume_after_restart(args.resume, args.output_dir)
    check_output_dir(args.output_dir, resume)
    resume = resolve_resume(resume, args.output_dir)
    saved = weights.load(resume) if resume else {}
    config = options.model_config(args)
    if saved:
        # the checkpoint has the weights: do not load timm's
        config.kwargs.pop("pretrained", None)
    teacher = None
    if options.distillation_kind(args) != "none":
        overrides = {"name": args.teacher_model} if "teacher_model" in args.given else {}
        teacher = build.load_teacher(args.teacher_path, config, args.teacher_model, **overrides)
    if args.test_speed:
        measure_speed(args, config, precision)

    # Data; the training set says which classes there are
    data = data_options.data_config(args, precision.device, resumed=build.read_data_config(saved))
    train_set = datasets.build_train_set(data, config, data_options.augment_config(args))
    data = replace(data, split_images=len(getattr(train_set, "dataset", train_set)))
    val_set = datasets.build_val_set(data, config, train_set.classes)
    build.check_classes(resume, saved.get("classes"), train_set.classes)
    config = replace(config, num_classes=build.resolve_num_classes(args.nb_classes, train_set.classes))
    train_loader = datasets.build_train_loader(
        train_set, data, batch_size=args.batch_size, repeated_aug=args.repeated_aug, seed=args.seed
    )
    val_loader = datasets.build_val_loader(val_set, data, batch_size=int(1.5 * args.batch_size))

    # Model, EMA, optimizer and schedule, as they begin or as they were saved
    distributed.seed_everything(args.seed + distributed.rank())
    model = build_initial_model(args, config, precision)
    if args.finetune and not saved:
        build.init_from_checkpoint(model, args.finetune, args.use_ema)
    frozen = optim.freeze(model, args.freeze)
    updates_per_epoch = math.ceil(len(train_loader) / args.accum_steps)
    state = build_state(args, model, config, data, train_set.classes, updates_per_epoch, precision)
    if saved:
        state.load_state_dict(saved, resume)
        del saved
    if state.epoch + 1 >= args.epochs:
        print0(f"{resume}: this run is finished ({state.epoch + 1} epochs of {args.epochs}); nothing to do")
        return
    criterion, mixup = build_loss_and_mixup(args, state, teacher, precision, train_set.targets)
    if args.save_images and distributed.is_primary():
        report.draw_first_batch(criterion, state)
    distinct = train_loader.sampler.distinct_images(args.batch_size)
    log.print_run_summary(state, len(train_set), len(val_set), distinct)
    with log.RunLog(state.folder) as run_log:
        run_log.start(log.describe_run(state, precision), state.epoch + 1, state.step)
        if args.log_wandb and distributed.is_primary():
            state.wandb_id = run_log.start_wandb(args.log_wandb, state.wandb_id)
        run_epochs(args, state, train_loader, val_loader, criterion, mixup, frozen, run_log, precision, stop)
    log.print_best(state)


def run_epochs(
    args: argparse.Namespace,
    state: TrainState,
    train_loader: DataLoader,
    val_loader: DataLoader,
    criterion: nn.Module,
    mixup: Mixup | None,
    frozen: Sequence[nn.Module],
    run_log: log.RunLog,
    precision: Precision,
    stop: StopSignal | None,
) -> None:
    """Train, save, evaluate and log each epoch that is left."""
    prepare = DeviceTransform(state.config, precision)
    prepare_train = DeviceTransform(state.config, precision, data_options.augment_config(args))
    keep_rate_schedule = options.keep_rate_schedule(args, state.updates_per_epoch)
    if args.compile:
        state.model.compile(mode=args.torchcompile_mode)
        if state.ema is not None:
            state.ema.module.compile(mode=args.torchcompile_mode)
    model = distributed.wrap_ddp(state.model, precision.device)

    for epoch in range(state.epoch + 1, args.epochs):
        # An epoch's images and learning rate depend on its number alone
        train_loader.sampler.set_epoch(epoch, state.update * args.accum_steps * args.batch_size)
        state.lr_scheduler.step(epoch)
        model.train(args.train_mode)
        for module in frozen:
            module.eval()
        if mixup is not None:
            # timm's Mixup smooths the labels even when it is disabled
            mixup.mixup_enabled = not args.mixup_off_epoch or epoch < args.mixup_off_epoch
        stats = engine.train_one_epoch(
            model,
            criterion,
            train_loader,
            precision,
            state,
            prepare=prepare_train,
            seed=args.seed + distributed.rank(),
            run_log=run_log,
            stop=stop,
            accum_steps=args.accum_steps,
            clip_grad=args.clip_grad,
            mixup=mixup,
            keep_rate_schedule=keep_rate_schedule,
            print_freq=args.print_freq,
        )

        # Batch norms were local to each process
        distributed.broadcast_buffers(state.model)
        if state.ema is not None:
            distributed.broadcast_buffers(state.ema.module)

        # Save before evaluating, so that the epoch is not lost with its evaluation
        started = time.time()
        test = {}
        if (epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs:
            state.save()
            test = evaluate_state(args, state, val_loader, precision, prepare, stop)
        stats["epoch_seconds"] = state.seconds + time.time() - started
        best = state.finish_epoch(test)
        run_log.log_epoch(log.log_line(state, stats, test))
        state.save(best)
        log.print_epoch(state, bool(test), stats["epoch_seconds"])


def build_initial_model(args: argparse.Namespace, config: ModelConfig, precision: Precision) -> nn.Module:
    """Return a model with random or timm's weights on the run's device, the same on every process."""
    # timm's weights are downloaded once
    with distributed.primary_first() if args.pretrained else nullcontext():
        model = build.build_model(config, grad_checkpointing=args.grad_checkpointing)
    # As published, SOPE's batch norms are synchronised over the processes, and DAFF's are not
    if isinstance(model, DHVT) and distributed.is_distributed():
        if precision.device.type == "cpu":
            print0("SOPE's batch norms stay local to each process: torch cannot synchronise them on a CPU")
        else:
            model.patch_embed = nn.SyncBatchNorm.convert_sync_batchnorm(model.patch_embed)
    precision.place(model)
    distributed.broadcast_state(model)
    return model


def build_state(
    args: argparse.Namespace,
    model: nn.Module,
    config: ModelConfig,
    data: DataConfig,
    classes: Sequence[str],
    updates_per_epoch: int,
    precision: Precision,
) -> TrainState:
    """Return the state of a run at its beginning."""
    ema = None
    if args.model_ema:
        device = "cpu" if args.model_ema_force_cpu else None
        ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup, device=device)
    lr, lr_info = options.scale_lr(args, distributed.world_size())
    print0(lr_info)
    optimizer_args = {**optimizer_kwargs(args), "lr": lr}
    optimizer = optim.build_optimizer(model, precision.device, opt_kwargs=args.opt_kwargs, **optimizer_args)
    scheduler = optim.build_scheduler(optimizer, **{**scheduler_kwargs(args), "decay_milestones": [args.decay_epochs]})
    return TrainState(
        model=model,
        ema=ema,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        scaler=precision.scaler,
        config=config,
        data=data,
        classes=classes,
        args=vars(args) | {"given": sorted(args.given)},
        updates_per_epoch=updates_per_epoch,
        folder=Path(args.output_dir) if args.output_dir else None,
        epoch=args.start_epoch - 1,
    )


def build_loss_and_mixup(
    args: argparse.Namespace,
    state: TrainState,
    teacher: build.TrainedModel | None,
    precision: Precision,
    targets: Sequence[int] | None,
) -> tuple[nn.Module, Mixup | None]:
    """Return criterion(images, outputs, targets) and mixup, None if off; `targets` are all training images' labels."""
    num_classes = state.config.num_classes
    mixup = data_options.build_mixup(args, num_classes)
    balanced = args.class_weights == "balanced"
    class_weights = optim.balanced_class_weights(targets, num_classes).to(precision.device) if balanced else None
    loss = optim.build_criterion(mixup, args.smoothing, args.bce_loss, class_weights)
    if teacher is None:
        return ImageLoss(loss), mixup

    kind = options.distillation_kind(args)
    build.check_teacher(teacher, state.model, state.classes, two_heads=kind != "kd")
    if kind != "kd":
        # from here on the model trains both its heads
        state.model.set_distilled_training(True)
    print0(f"Teacher {teacher.config.name}, {log.count_parameters(teacher.model)} parameters")
    distillation = DistillationLoss(
        loss,
        precision.place(teacher.model),
        kind,
        args.distillation_alpha,
        args.distillation_tau,
        precision.autocast,
    )
    return distillation, mixup


def evaluate_state(
    args: argparse.Namespace,
    state: TrainState,
    loader: DataLoader,
    precision: Precision,
    prepare: DeviceTransform,
    stop: StopSignal | None,
) -> dict[str, float]:
    """Evaluate the raw weights, and the EMA weights if there are any; return numbers for log.txt."""
    models = {"test": state.model}
    if state.ema is not None:
        models["test_ema"] = state.ema.module
        if args.model_ema_force_cpu:
            models["test_ema"] = copy.deepcopy(state.ema.module).to(precision.device)
    line = {}
    for name, model in models.items():
        # Norm layers are folded in a copy; a compiled model fuses them by itself
        folded = model if args.compile else reparameterize_model(model.eval())
        test = engine.evaluate(folded, loader, precision, prepare=prepare, keep_rate=state.keep_rate, stop=stop)
        line |= {f"{name}_{key}": test[key] for key in ("loss", "acc1", "acc5")}
        if name == "test":
            line["test_topk"] = test["topk"]
            log.print_accuracy(test)
        else:
            print0(f"EMA: Acc@1 {test['acc1']:.3f} loss {test['loss']:.3f}")
    return line


def load_for_inference(args: argparse.Namespace) -> build.TrainedModel:
    """Return the model of --resume, or timm's with --pretrained; flags that were given override the checkpoint."""
    if not args.resume:  # --pretrained
        config = options.model_config(args)
        with distributed.primary_first():
            return build.TrainedModel(build.build_model(config).eval(), config, None, None, "timm")
    resume = resolve_resume(args.resume, args.output_dir)
    if not resume:
        raise InputError(f"--resume auto: no checkpoint in {args.output_dir}; name another folder")
    return build.load_trained(resume, use_ema=args.use_ema, **options.model_overrides(args))


def evaluate(args: argparse.Namespace, precision: Precision) -> None:
    """Evaluate a checkpoint on the validation set that it was trained with, or on the one that the flags name."""
    trained = load_for_inference(args)
    config = trained.config
    data = data_options.data_config(args, precision.device, trained.data)
    val_set = datasets.build_val_set(data, config, trained.classes)
    build.check_classes(trained.source, trained.classes, val_set.classes, trained.model.num_classes)
    if args.test_speed:
        measure_speed(args, config, precision)
    description = f"{config.name} at {describe_size(config.input_size)}, on {data.describe_validation()}"
    print0(f"Evaluating {'EMA' if args.use_ema else 'raw'} weights of {trained.source}: {description}")
    model = precision.place(reparameterize_model(trained.model))
    if args.compile:
        model.compile(mode=args.torchcompile_mode)
    # before the evaluation, which may take hours, so that a bad path fails at once
    if args.report:
        Path(args.report).mkdir(parents=True, exist_ok=True)
    loader = datasets.build_val_loader(val_set, data, batch_size=int(1.5 * args.batch_size))
    outputs = [] if args.report else None
    test = engine.evaluate(model, loader, precision, prepare=DeviceTransform(config, precision), collect=outputs)
    log.print_accuracy(test)
    if args.report:
        report.write_report(Path(args.report), outputs, loader, config)
    # within two standard deviations of guessing
    chance = 1 / model.num_classes
    if test["acc1"] / 100 < chance + 2 * math.sqrt(chance * (1 - chance) / test["count"]):
        print0(f"This is chance for {model.num_classes} classes: is it the right checkpoint, and the right data?")


def visualize_model(args: argparse.Namespace, precision: Precision) -> None:
    """Write pictures of what a checkpoint's model looks at, on rank 0."""
    trained = load_for_inference(args)
    if args.image_dir:
        dataset = datasets.build_image_set(args.image_dir, trained.config)
    else:
        # timm's transform normalizes the images itself
        data = replace(data_options.data_config(args, precision.device, trained.data), transform="timm")
        dataset = datasets.build_val_set(data, trained.config, trained.classes)
        build.check_classes(trained.source, trained.classes, dataset.classes)
    if not distributed.is_primary():
        return
    count = min(args.n_visualization, len(dataset))
    folder = Path(args.output_dir or ".") / "visualization"
    written = visualize.write_pictures(
        options.visualization_mode(args),
        precision.place(trained.model),
        datasets.evenly_spaced(dataset, count),
        folder=folder,
        # without names in the checkpoint, the data's names are right only for as many outputs
        classes=trained.classes or (dataset.classes if len(dataset.classes) == trained.model.num_classes else None),
        autocast=precision.autocast,
        device=precision.device,
        config=trained.config,
        blocks=args.blocks,
        file_format=args.format,
        npz=args.npz,
    )
    print0(f"{len(written)} pictures of {count} images are in {folder}; open {written[-1]} first")


def measure_speed(args: argparse.Namespace, config: ModelConfig, precision: Precision) -> None:
    """Print throughput and MACs, on rank 0; under --output_dir write them to speed_macs.txt too."""
    if not distributed.is_primary():
        return
    if args.output_dir:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    model = build.build_model(config, grad_checkpointing=args.grad_checkpointing).to(precision.device)
    gmacs = engine.count_macs(model, config.input_size)
    batch_size = args.speed_batch_size or args.batch_size
    lines = [
        f"{config.name}: {gmacs:.3f} GMACs (1 MAC = 2 FLOPs) at {describe_size(config.input_size)}",
        f"batches of {batch_size}, {precision}{', compiled' if args.compile else ''}, "
        f"{distributed.describe(precision.device)}, torch {torch.__version__}",
    ]
    print0("\n".join(lines))
    benchmark_args = {"compile_mode": args.torchcompile_mode if args.compile else None, "gmacs": gmacs}
    for mode in ("inference", "train"):
        row = engine.benchmark(model, config.input_size, batch_size, precision, train=mode == "train", **benchmark_args)
        lines.append(f"{mode}: {log.describe_speed(row)}")
        print0(lines[-1])
    if args.output_dir:
        Path(args.output_dir, "speed_macs.txt").write_text("\n".join(lines) + "\n")


def run(argv: list[str]) -> None:
    args = options.parse(argv)
    device = distributed.init(args.device, args.dist_backend, args.dist_timeout)
    distributed.end_with_launcher()
    # the checkpoint stores the resolved value, so that a resume on another kind of device reports the change
    args.amp = resolve_amp(args.amp, device)
    precision = Precision(device, DTYPES[args.amp], args.channels_last)
    if args.deterministic:
        distributed.make_deterministic()
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    if args.only_test_speed:
        measure_speed(args, options.model_config(args), precision)
    elif options.visualization_mode(args):
        visualize_model(args, precision)
    elif args.eval:
        evaluate(args, precision)
    else:
        # a stop signal saves after the update under way; without --output_dir it ends the process as usual
        with StopSignal(args.checkpoint_interval) if args.output_dir else nullcontext() as stop:
            train(args, precision, stop)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("main.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
