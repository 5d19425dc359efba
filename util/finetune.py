"""Fine-tuning: start from weights made for other classes, sizes or channels, and train a part of the model."""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from util import checkpoint
from util.distributed import print0
from util.errors import InputError

Weights = dict[str, Tensor]


def classifier_names(model: nn.Module) -> list[str]:
    """Name the modules that give the classes: those of timm's cfg, such as head, head.fc or (head, head_dist)."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = [names] if isinstance(names, str) else names
    modules = dict(model.named_modules())
    return [n for n in names if n in modules] or [n for n in ("head", "head_dist", "fc", "classifier") if n in modules]


def load(
    model: nn.Module,
    saved: dict[str, Any],
    source: str,
    use_ema: bool = False,
    adapt: Callable[[Weights, nn.Module], Weights] | None = None,
) -> None:
    """Load what fits of a checkpoint, as `checkpoint.load` gives it, and say what did and what did not.

    A head of another shape stays as it was initialised, position embeddings are resampled, and the first convolution
    is fitted to other input channels; `adapt(weights, model)` does what only the model knows. Raises InputError when
    less than half of the model's tensors, or of the file's, match, the heads apart: many a model shares the names and
    shapes of a ViT's attention.
    """
    key = "model_ema" if use_ema else "model"
    if not isinstance(saved.get(key), dict):
        raise InputError(f"{source}: no {key} in it; leave out --use-ema")
    theirs = {k: v for k, v in checkpoint.strip_prefixes(saved[key]).items() if isinstance(v, Tensor)}
    own = model.state_dict()
    said: dict[str, list[str]] = {}
    said["re-initialised"] = _drop_other_heads(model, own, theirs)
    said["resampled"] = resample_pos_embed(model, theirs, saved)
    said["adapted"] = _adapt_channels(model, theirs)
    if adapt is not None:
        theirs |= adapt({k: v for k, v in theirs.items() if k in own and v.ndim == own[k].ndim}, model)
    fitting = {k: theirs[k] for k in own if k in theirs and theirs[k].shape == own[k].shape}
    said["missing"] = [k for k in own if k not in theirs and k not in said["re-initialised"]]
    said["unexpected"] = [k for k in theirs if k not in own]
    said["mismatched"] = [k for k in own if k in theirs and k not in fitting]
    backbone, given, matched = (
        sum(not _is_below(k, classifier_names(model)) for k in names) for names in (own, theirs, fitting)
    )
    if 2 * matched < max(backbone, given):
        differ = [f"{k} {tuple(theirs[k].shape)} for {tuple(own[k].shape)}" for k in said["mismatched"]]
        others = ", ".join(_count(what, said[what]) for what in ("missing", "unexpected"))
        raise InputError(
            f"{source}: only {matched} tensors match of the model's {backbone} before the head and the file's {given}, "
            f"{others}, {_count('of another shape', differ)}; did you mean another --model?"
        )
    model.load_state_dict(fitting, strict=False)
    counts = ", ".join(_count(what, names) for what, names in {"matched": list(fitting), **said}.items())
    print0(f"Fine-tuning {'EMA' if use_ema else 'raw'} weights of {source}: {counts}")
    if 20 * matched < 19 * backbone:
        print0(f"{backbone - matched} of {backbone} tensors before the head start untrained: is it of another --model?")


def _count(what: str, names: list[str]) -> str:
    return f"{what} {len(names)}" + (f" (first {names[0]})" if names else "")


def _is_below(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _drop_other_heads(model: nn.Module, own: Weights, theirs: Weights) -> list[str]:
    """Take heads of which any tensor has another shape out of `theirs`; name the model's tensors so left alone."""
    left = []
    for head in classifier_names(model):
        names = [k for k in own if _is_below(k, [head])]
        if any(k in theirs and theirs[k].shape != own[k].shape for k in names):
            for name in names:
                theirs.pop(name, None)
            left += names
    return left


def _adapt_channels(model: nn.Module, theirs: Weights) -> list[str]:
    """Fit the first convolution to the model's input channels as timm does; name what was changed."""
    convs = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    changed = []
    for conv in [convs] if isinstance(convs, str) else convs:
        name, own = f"{conv}.weight", dict(model.named_parameters()).get(f"{conv}.weight")
        given = theirs.get(name)
        if own is None or given is None or given.ndim != 4 or own.ndim != 4 or given.shape[1] == own.shape[1]:
            continue
        # a stem that folds pixels into channels is none that repeated channels would fit
        if getattr(model, "in_chans", own.shape[1]) == own.shape[1]:
            theirs[name] = adapt_input_conv(own.shape[1], given, base_chans=given.shape[1])
            changed.append(name)
    return changed


def _find_grid(model: nn.Module, saved: dict[str, Any]) -> tuple[int, int] | None:
    """Derive the checkpoint's patch grid from the --input-size that it says it was trained with."""
    args = saved.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    size = args.get("input_size") if isinstance(args, dict) else None
    size = [size] if isinstance(size, int) else size
    measure = getattr(getattr(model, "patch_embed", None), "dynamic_feat_size", None)
    if measure is None or not isinstance(size, list | tuple) or not size or not all(isinstance(s, int) for s in size):
        return None
    height, width = measure(tuple(size * 2)[:2])
    return height, width


def resample_pos_embed(model: nn.Module, theirs: Weights, saved: dict[str, Any]) -> list[str]:
    """Bring a ViT's `pos_embed`, [1, prefix + H * W, C], to the model's grid; return its name if it was changed.

    Bicubic without antialiasing, as DeiT was fine-tuned. The prefix (class and distillation tokens) is untouched; of
    a token that the checkpoint lacks, the model's own embedding stays.
    """
    own, given, known = getattr(model, "pos_embed", None), theirs.get("pos_embed"), _find_grid(model, saved)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not isinstance(own, Tensor) or not isinstance(given, Tensor) or grid is None:
        return []
    if own.ndim != 3 or given.ndim != 3 or given.shape[0] != own.shape[0] or given.shape[2] != own.shape[2]:
        return []
    prefix = own.shape[1] - math.prod(grid)
    found = _find_layout(theirs, given.shape[1], prefix, tuple(grid), known) if prefix >= 0 else None
    if found is None or found == (prefix, tuple(grid)):
        return []
    tokens, old = found
    resampled = resample_abs_pos_embed(
        given.float(), list(grid), list(old), tokens, interpolation="bicubic", antialias=False, align_corners=False
    )
    common = min(tokens, prefix)
    parts = [resampled[:, :common], own.detach()[:, common:prefix], resampled[:, tokens:]]
    theirs["pos_embed"] = torch.cat(parts, dim=1)
    return ["pos_embed"]


def _find_layout(
    theirs: Weights, length: int, prefix: int, grid: tuple[int, int], known: tuple[int, int] | None
) -> tuple[int, tuple[int, int]] | None:
    """Split `length` position embeddings into prefix tokens and a grid: the known one, a square, or the model's."""
    tokens = [theirs.get(k) for k in ("cls_token", "dist_token", "reg_token")]
    tokens = [t for t in tokens if isinstance(t, Tensor) and t.ndim == 3]
    choices = [(n, length - n) for n in (prefix, sum(t.shape[1] for t in tokens), 0) if length > n]
    for n, patches in choices:
        if known is not None and patches == math.prod(known):
            return n, known
    for n, patches in choices:
        side = math.isqrt(patches)
        if side * side == patches:
            return n, (side, side)
        if patches == math.prod(grid):
            return n, grid
    return None


def freeze(model: nn.Module, what: str) -> list[nn.Module]:
    """Freeze all but the classifier (`head`), or all but the last `what` blocks and what follows them.

    Returns the norms with running statistics that are to stay in evaluation mode while training: they are not
    converted, so that the names in checkpoints stay. An empty `what` freezes nothing. Raises InputError.
    """
    if not what:
        return []
    kept = classifier_names(model)
    if what != "head":
        kept = list(dict.fromkeys(_name_last_blocks(model, what) + kept))
    model.requires_grad_(False)
    for name in kept:
        model.get_submodule(name).requires_grad_(True)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print0(f"--freeze {what}: {trained} of {total} parameters are trained, those of {', '.join(kept)}")
    return [
        module
        for name, module in model.named_modules()
        if getattr(module, "running_var", None) is not None and not _is_below(f"{name}.", kept)
    ]


def _name_last_blocks(model: nn.Module, what: str) -> list[str]:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise InputError(f"--freeze {what}: {type(model).__name__} has no blocks to count; --freeze head works")
    if not what.isdecimal() or int(what) > len(blocks):
        raise InputError(f"--freeze {what}: must be head or a number up to {len(blocks)}, the blocks of the model")
    children = [name for name, _ in model.named_children()]
    after = [name for name in children[children.index("blocks") + 1 :] if list(model.get_submodule(name).parameters())]
    return [f"blocks.{i}" for i in range(len(blocks) - int(what), len(blocks))] + after
