"""What trains a model: optimizer, learning rate schedule, criterion, and which part of the model is trained."""

from collections.abc import Sequence

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from util.distributed import print0
from util.errors import InputError, first_line
from util.weights import classifier_names, is_below


def build_optimizer(
    model: nn.Module, device: torch.device, opt: str, opt_kwargs: dict | None = None, **kwargs
) -> torch.optim.Optimizer:
    """Return any of timm's optimizers; `kwargs` and `opt_kwargs` are those of `create_optimizer_v2`.

    Raises InputError for an unknown optimizer, for arguments that it does not take, and for one given in both.
    """
    opt_kwargs = opt_kwargs or {}
    # one kernel for all parameters, which torch has for these
    if device.type in ("cpu", "cuda") and opt.lower() in ("adam", "adamw"):
        opt_kwargs = {"fused": True, **opt_kwargs}
    try:
        optimizer = create_optimizer_v2(model, opt, **kwargs, **opt_kwargs)
    except (ValueError, TypeError, AssertionError, KeyError, RuntimeError, ImportError) as error:
        raise InputError(
            f"--opt {opt}: {first_line(error)}; change --opt-kwargs, or --opt, which timm.optim.list_optimizers() names"
        ) from None
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"--opt {opt} needs second derivatives, which are not computed here: choose another")
    return optimizer


def build_scheduler(optimizer: torch.optim.Optimizer, sched: str, **kwargs) -> Scheduler:
    """Return timm's learning rate schedule, a function of the epoch. Raises InputError."""
    try:
        scheduler, _ = create_scheduler_v2(optimizer, sched, **kwargs)
    except ValueError as error:
        raise InputError(
            f"--sched {sched}: {first_line(error)}; change --decay-epochs, --warmup-epochs or --epochs"
        ) from None
    return scheduler


def balanced_class_weights(targets: Sequence[int] | None, num_classes: int) -> Tensor:
    """Return weights [classes] in inverse proportion to the classes' images, with mean 1 over the images.

    A class without images weighs nothing. Raises InputError for `targets` None.
    """
    from sklearn.utils.class_weight import compute_class_weight

    if targets is None:
        raise InputError("--class-weights balanced: this database does not list its labels; leave it out")
    weights = torch.zeros(num_classes)
    present = np.unique(targets)
    weights[present] = torch.from_numpy(compute_class_weight("balanced", classes=present, y=targets)).float()
    return weights


def build_criterion(mixup: Mixup | None, smoothing: float, bce_loss: bool, weights: Tensor | None = None) -> nn.Module:
    """Return a loss(logits [B, classes], targets); `weights` [classes] scale each class's contribution.

    Targets are class numbers [B] or, mixed, shares [B, classes].
    """
    # a class with any share in a mixed image is a positive target
    if bce_loss:
        return BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0, pos_weight=weights)
    # mixup smooths its targets itself
    return nn.CrossEntropyLoss(weights, label_smoothing=0.0 if mixup else smoothing)


def freeze(model: nn.Module, what: str) -> list[nn.Module]:
    """Freeze all but the classifier ("head"), or all but the last `what` blocks and what follows them.

    Returns the frozen norm layers with running statistics, which must stay in eval mode while training. An empty `what`
    freezes nothing. Raises InputError for more blocks than there are.
    """
    if not what:
        return []

    # Names of the modules that are trained
    trained = classifier_names(model.pretrained_cfg)
    if what != "head":
        trained = last_blocks(model, int(what)) + trained
    model.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)

    # the classifier's name comes twice if it follows the blocks
    names = ", ".join(dict.fromkeys(trained))
    print0(f"--freeze {what}: only {names} are trained")
    return [
        module
        for name, module in model.named_modules()
        if getattr(module, "running_var", None) is not None and not is_below(f"{name}.", trained)
    ]


def last_blocks(model: nn.Module, count: int) -> list[str]:
    """Return the names of the last `count` blocks and of the modules after them. Raises InputError."""
    # blocks of other models, for example ResNet's, are in stages
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise InputError(f"--freeze {count}: {type(model).__name__} has no blocks to count; --freeze head works")
    if count > len(blocks):
        raise InputError(f"--freeze {count}: the model has {len(blocks)} blocks; give head or a lower number")
    # modules are registered in the order in which an image passes them
    names = [name for name, _ in model.named_children()]
    after = [name for name in names[names.index("blocks") + 1 :] if list(model.get_submodule(name).parameters())]
    return [f"blocks.{i}" for i in range(len(blocks) - count, len(blocks))] + after
