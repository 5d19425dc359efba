"""From the command line's namespace to model, optimizer, schedule and criterion."""

import argparse
import difflib
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.models import PretrainedCfg
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from models.dhvt import DHVT, filter_state_dict
from util import checkpoint, checks, distributed, finetune
from util.distributed import print0
from util.errors import InputError
from util.keep_rate import keep_rate_at
from util.measure import can_fuse


def find_cfg(name: str, flag: str = "--model") -> PretrainedCfg:
    """Give what timm knows of a model before it is built. Raises InputError for an unknown one."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise InputError(f"{flag} {name}: no such model; {hint}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise InputError(f"{flag} {name}: {error} Leave out what follows the dot") from None


def find_input_size(args: argparse.Namespace) -> tuple[int, int]:
    """Give (height, width): --input-size, else the model's own. Raises InputError for an unknown model."""
    cfg = find_cfg(args.model)
    return tuple(cfg.input_size[-2:]) if args.input_size is None else tuple(args.input_size * 2)[:2]


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


def build_model(
    args: argparse.Namespace, num_classes: int | None, size: tuple[int, int], flag: str = "--model"
) -> nn.Module:
    """Create the model for `size` (height, width); models that take any size are not told it. Errors name `flag`.

    --drop acts inside a transformer's blocks, as published; timm's drop_rate would be the classifier's.
    """
    kwargs: dict[str, Any] = {"img_size": size, "drop_path_rate": args.drop_path}
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if args.drop:
        kwargs |= {"pos_drop_rate": args.drop, "proj_drop_rate": args.drop}
    optional = {"img_size"} | ({"drop_path_rate"} if args.drop_path == 0.1 else set())
    if args.model in timm.list_models(module="evit"):
        kwargs["base_keep_rate"], kwargs["fuse_token"] = args.base_keep_rate, args.fuse_token
        kwargs["drop_loc"] = checks.find_drop_loc(args.drop_loc)
    kwargs |= args.model_kwargs
    while True:
        try:
            model = timm.create_model(args.model, **kwargs)
            if min(getattr(getattr(model, "patch_embed", None), "grid_size", None) or size) < 1:
                raise ValueError("smaller than a patch; give a larger --input-size")
            return model
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or (name := unknown[1]) not in kwargs:
                raise InputError(f"{flag} {args.model}: {str(error).splitlines()[0]}") from None
            if name not in optional or name in args.model_kwargs:
                flags = {"drop_path_rate": "--drop-path", "pos_drop_rate": "--drop", "proj_drop_rate": "--drop"}
                wrong = f"--model-kwargs {name}" if name in args.model_kwargs else flags[name]
                raise InputError(f"{flag} {args.model} takes no {name}: leave out {wrong}") from None
            del kwargs[name]
        except (AssertionError, ValueError, RuntimeError, ArithmeticError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            given = "".join(f" {k}={v}" for k, v in args.model_kwargs.items())
            given = f" with --model-kwargs{given}" if given else ""
            raise InputError(f"{flag} {args.model} at {size[0]}x{size[1]} pixels{given}: {reason}") from None


def speed_up(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """Lay out a model's weights and have it keep or recompute activations, as the flags say; in place."""
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AttributeError, AssertionError):
            raise InputError(f"--grad-checkpointing: --model {args.model} cannot do it; leave it out") from None
    return model


def count_head(name: str, weights: dict[str, Any]) -> int | None:
    """Give the number of classes of a model's weights by its classifier's rows; None where they do not tell."""
    classifier = timm.get_pretrained_cfg(name).classifier
    classifier = classifier if isinstance(classifier, str) else (classifier or ("",))[0]
    head = checkpoint.strip_prefixes(weights).get(f"{classifier}.weight")
    return len(head) if isinstance(head, torch.Tensor) and head.ndim else None


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


def build_keep_rate(args: argparse.Namespace, updates: int) -> Callable[[int], float] | None:
    """Give the keep rate as a function of the update, counted from 0 over all epochs of `updates` each.

    None for a model that does not reorganise tokens.
    """
    if args.model not in timm.list_models(module="evit"):
        return None
    start, end = args.shrink_start_epoch, args.shrink_start_epoch + args.shrink_epochs
    return lambda update: keep_rate_at(update, start, end, updates, args.base_keep_rate)


def load_teacher(args: argparse.Namespace, size: tuple[int, int]) -> tuple[nn.Module | None, list[str] | None]:
    """Build the teacher for `size` (height, width), with its weights; it has the number of classes of its file.

    The second value is the names of its classes, where the file has them, as ours do. Without distillation there is
    no teacher. The random stream stays as it is: the student starts from the weights it would have without one.

    Raises InputError for a student without a distillation head, and for a teacher that does not fit its file.
    """
    if args.distillation_type == "none":
        return None, None
    find_cfg(args.teacher_model, "--teacher-model")
    with torch.random.fork_rng(devices=[]):
        check_student(args, size)
        saved = checkpoint.load(args.teacher_path)
        weights = checkpoint.strip_prefixes(saved.pop("model"))
        num_classes = count_head(args.teacher_model, weights)
        whole = {"base_keep_rate": 1.0, "fuse_token": False, "drop_loc": ""}  # of EViT as a teacher: it sees all tokens
        like_model = argparse.Namespace(model=args.teacher_model, model_kwargs={}, drop=0.0, drop_path=0.1, **whole)
        teacher = build_model(like_model, num_classes, size, "--teacher-model")
    remedy = "give the --teacher-model and --input-size it was trained with"
    checkpoint.load_weights(teacher, weights, args.teacher_path, "teacher's weights", remedy)
    if not all(t.isfinite().all() for t in teacher.state_dict().values()):
        raise InputError(f"{args.teacher_path}: the teacher's weights are not finite; use an older checkpoint")
    try_out(teacher.eval(), size, f"--teacher-model {args.teacher_model}")
    names = saved.get("classes")
    return teacher, names if isinstance(names, list) and all(isinstance(n, str) for n in names) else None


def check_student(args: argparse.Namespace, size: tuple[int, int]) -> None:
    """Refuse a model that does not give two heads' outputs in training; some have the switch, and no second head."""
    student = build_model(args, args.nb_classes, size)
    if hasattr(student, "set_distilled_training"):
        student.set_distilled_training(True)
        outputs = try_out(student.train(), size, f"--model {args.model}")
        if isinstance(outputs, tuple) and len(outputs) == 2:
            return
    near = difflib.get_close_matches(args.model, timm.list_models("*distilled*"), n=3, cutoff=0.0)
    raise InputError(
        f"--model {args.model} has no distillation head, which --distillation-type {args.distillation_type} trains: "
        f"take a model that has one, such as {', '.join(near)}"
    )


@torch.no_grad()
def try_out(model: nn.Module, size: tuple[int, int], what: str) -> Any:
    """Run a model on two black images, as it will be run in training. Raises InputError, beginning with `what`."""
    try:
        return model(torch.zeros(2, 3, *size))
    except (AssertionError, ValueError, RuntimeError, IndexError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{what} at {size[0]}x{size[1]} pixels: {reason}; give another --input-size") from None


def load_finetuned(args: argparse.Namespace, model: nn.Module, saved: dict[str, Any]) -> None:
    """Start from the weights of --finetune, as far as they fit; `saved` is empty where there are none."""
    if saved:
        adapt = filter_state_dict if isinstance(model, DHVT) else None
        finetune.load(model, saved, args.finetune, args.use_ema, adapt)


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
    kwargs = {"fused": True} if can_fuse(device) and args.opt.lower() in ("adam", "adamw") else {}
    kwargs |= {} if args.opt_betas is None else {"betas": args.opt_betas}
    kwargs |= {} if args.layer_decay is None else {"layer_decay": args.layer_decay}
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
    if args.layer_decay is not None:
        least = min(group["lr_scale"] for group in optimizer.param_groups)
        text += f", the head's; --layer-decay {args.layer_decay:g} makes it {lr * least:.3g} in the first trained layer"
    return optimizer, scheduler, {"effective_batch": batch, "effective_lr": lr, "text": text}


def build_criterion(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, Mixup | None]:
    mixup = None
    if checks.mixup_active(args):
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
