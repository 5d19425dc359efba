"""What trains a model: optimizer, learning rate schedule, criterion, and which part of the model is trained."""

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from util.distributed import print0
from util.errors import InputError
from util.weights import classifier_names, first_line, is_below


def build_optimizer(model: nn.Module, device: torch.device, opt: str, **kwargs) -> torch.optim.Optimizer:
    """Return any of timm's optimizers; `kwargs` are those of `create_optimizer_v2`. Raises InputError."""
    # one kernel for all parameters, which torch has for these
    if device.type in ("cpu", "cuda") and opt.lower() in ("adam", "adamw"):
        kwargs["fused"] = True
    try:
        return create_optimizer_v2(model, opt, **kwargs)
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise InputError(f"--opt {opt}: {first_line(error)}; timm.optim.list_optimizers() names them all") from None


def build_scheduler(optimizer: torch.optim.Optimizer, sched: str, **kwargs) -> Scheduler:
    """Return timm's learning rate schedule, a function of the epoch."""
    scheduler, _ = create_scheduler_v2(optimizer, sched, **kwargs)
    return scheduler


def build_criterion(mixup: Mixup | None, smoothing: float, bce_loss: bool) -> nn.Module:
    """Return the loss of (logits, targets)."""
    # every class that mixup shows in part is there: its target is 1
    if bce_loss:
        return BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    # mixup smooths its targets itself
    return nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else smoothing)


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
