"""Model weights from any file, and how they are fitted to a model: strictly, or as far as they match (fine-tuning)."""

import argparse
import json
import math
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from util import distributed
from util.distributed import print0
from util.errors import InputError, first_line

# What published checkpoints hold besides tensors: an argparse.Namespace with paths and NumPy numbers in it.
ALLOWED = [
    argparse.Namespace,
    pathlib.PosixPath,
    np._core.multiarray.scalar,
    # its name before NumPy 2
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(code)) for code in "f8 f4 f2 i8 i4 u1 ?".split()),
]


def load(source: str | Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU as {"model": state dict, plus whatever else the file contains}.

    `source` is a file written by torch.save or safetensors, a folder written by export.py or in timm's Hugging Face
    layout (config.json becomes "hf_config"), or an http(s) URL, which all processes must load together. Only tensors,
    plain values and the `ALLOWED` types are unpickled. Raises InputError.
    """
    path = Path(source)
    if str(source).startswith(("http://", "https://")):
        path = download(str(source))
    config = path / "config.json"
    try:
        if config.is_file():
            return {
                "hf_config": json.loads(config.read_bytes()),
                "model": load_file(path / "model.safetensors"),
            }
        if not path.is_file():
            folder = path if path.is_dir() else path.parent
            raise InputError(f"{path}: not a file; name one, for example {folder / 'best_checkpoint.pth'}")
        if path.suffix == ".safetensors":
            return {"model": load_file(path)}
        return wrap_state_dict(load_pickle(path), source)
    except InputError:
        raise
    except Exception as error:
        # of any kind: a damaged file makes the libraries raise what they like
        raise InputError(f"{path}: damaged, or not a checkpoint ({first_line(error)}); use another") from None


def download(url: str) -> Path:
    """Return the file of a URL in torch.hub's cache; rank 0 downloads it, with a progress bar, while others wait."""
    # files of different servers may have the same name
    parts = urlparse(url)
    path = Path(torch.hub.get_dir(), "checkpoints", f"{parts.netloc}{parts.path}".replace("/", "_"))
    with distributed.primary_first():
        if path.exists():
            return path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
        except Exception as error:
            # of any kind: names, connections and servers fail in many ways
            reason = first_line(error)
            raise InputError(f"{url}: cannot be downloaded ({reason}); download it, and name the file") from None
    return path


def load_pickle(path: Path) -> Any:
    """Load a file of torch.save, whose checksums are verified first, because torch does not."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise InputError(f"{path}: damaged, the checksum of {damaged} does not match; use an older checkpoint")
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, LookupError) as error:
        # torch's own words advise to load it unsafely
        refused = re.search(r"(?:GLOBAL|class|global|function) ([\w.]*\.[\w.]+)", str(error))
        if refused:
            raise InputError(f"{path}: refused, it holds {refused[1]}; save its state_dict alone") from None
        raise InputError(f"{path}: damaged, or not a PyTorch file; use another") from None


def wrap_state_dict(content: Any, source: str | Path) -> dict[str, Any]:
    """Return a file's content as {"model": state dict, …}, whichever program wrote it. Raises InputError."""
    if not isinstance(content, dict):
        raise InputError(f"{source}: holds a {type(content).__name__}, not a checkpoint or state dict")
    # "model" in DeiT's checkpoints and ours, "state_dict" in timm's and Lightning's
    weights = content.get("model") or content.get("state_dict")
    # or a bare state dict
    if content and all(isinstance(value, Tensor) for value in content.values()):
        weights = content
    if not isinstance(weights, dict):
        keys = ", ".join(map(str, list(content)[:6]))
        raise InputError(f"{source}: no state dict of a model in it (keys: {keys})")
    return {**content, "model": weights}


def saved_flags(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of the run that wrote a checkpoint, {} where it does not hold them."""
    flags = saved.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    return flags if isinstance(flags, dict) else {}


def get_weights(
    saved: Mapping[str, Any],
    source: str | Path,
    use_ema: bool = False,
) -> dict[str, Tensor]:
    """Return the raw or the EMA weights of a checkpoint, without the prefixes of wrappers. Raises InputError."""
    weights = saved.get("model_ema" if use_ema else "model")
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"{source}: no {'EMA ' if use_ema else ''}weights in it; leave out --use-ema")
    return {
        re.sub(r"^(?:module\.|_orig_mod\.)+", "", str(name)): tensor
        for name, tensor in weights.items()
        # a damaged file may hold anything
        if isinstance(tensor, Tensor)
    }


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str | Path,
    remedy: str = "",
) -> None:
    """Load a state dict strictly. Raises InputError that names the first difference and what to do."""
    remedy = remedy or "give the --model, --input-size, --nb-classes and --model-kwargs it was trained with"
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        # Below a title, torch prints a line for missing tensors, one for unexpected ones, and one per shape mismatch.
        problem = str(error).splitlines()[1].strip(" \t.")[:200]
        raise InputError(f"{source}: does not fit the model: {problem}; {remedy}") from None


# Fine-tuning: start from weights made for other classes, sizes or channels


def classifier_names(cfg: Mapping[str, Any]) -> list[str]:
    """Return the names of the modules that give the classes, for example head, head.fc or (head, head_dist)."""
    names = cfg.get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def is_below(name: str, modules: Sequence[str]) -> bool:
    """Return whether a tensor belongs to one of the modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def load_matching(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str,
    input_size: Sequence[int] | None = None,
    remedy: str = "",
) -> None:
    """Load the weights that match, and print what did and what did not.

    A head of another shape stays as it was initialised, and the position embedding is resampled from the file's
    `input_size`. Raises InputError when less than half of the tensors match.
    """
    expected = model.state_dict()
    heads = classifier_names(model.pretrained_cfg)
    resampled = fit_pos_embed(model, weights, input_size)
    shared = [name for name in expected if name in weights]
    matched = [name for name in shared if weights[name].shape == expected[name].shape]
    reshaped = [name for name in shared if name not in matched]
    report = {
        "matched": matched,
        "re-initialised": [name for name in reshaped if is_below(name, heads)],
        "resampled": ["pos_embed"] if resampled else [],
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [name for name in reshaped if not is_below(name, heads)],
    }
    counts = ", ".join(f"{len(k)} {what}{f' (first {k[0]})' if k else ''}" for what, k in report.items())

    # Many models share names and shapes with a ViT's attention, so a few matches mean nothing
    if 2 * len(matched) < max(len(expected), len(weights)):
        raise InputError(
            f"{source}: only {len(matched)} of the model's {len(expected)} and the file's {len(weights)} tensors match "
            f"({counts}); {remedy or 'did you mean another --model?'}"
        )
    model.load_state_dict({name: weights[name] for name in matched}, strict=False)
    print0(f"Fine-tuning from {source}: {counts}")


def fit_pos_embed(model: nn.Module, weights: dict[str, Tensor], input_size: Sequence[int] | None = None) -> bool:
    """Resample the `pos_embed` [1, prefix + H * W, C] in `weights` to the model's grid; return whether it changed.

    Bicubic without antialiasing, as in DeiT's fine-tuning. The file's grid follows from its `input_size` (height,
    width), or is taken for a square if that is None or does not match. Class and distillation tokens take the file's
    embeddings, or keep the model's where the file has none.
    """
    own = getattr(model, "pos_embed", None)
    saved = weights.get("pos_embed")
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if own is None or saved is None or grid is None or own.ndim != 3 or own.shape[2:] != saved.shape[2:]:
        return False
    prefix = own.shape[1] - math.prod(grid)

    # Prefix tokens in the file's embedding; none if the model embeds patches only, as DeiT III does
    tokens = ("cls_token", "dist_token", "reg_token") if prefix else ()
    old_prefix = sum(weights[name].shape[1] for name in tokens if name in weights)
    count = saved.shape[1] - old_prefix
    # The file's grid; models with dynamic input size store the grid they were built with, usually a square
    old_grid = model.patch_embed.dynamic_feat_size(input_size or (0, 0))
    if math.prod(old_grid) != count:
        old_grid = (math.isqrt(count), math.isqrt(count))
    if math.prod(old_grid) != count or (old_prefix, old_grid) == (prefix, tuple(grid)):
        return False
    resampled = resample_abs_pos_embed(
        saved[:, old_prefix:],  # 1, H * W, C
        new_size=grid,
        old_size=old_grid,
        num_prefix_tokens=0,
        antialias=False,
    )
    # of the class and distillation tokens those that both have
    common = min(old_prefix, prefix)
    parts = [saved[:, :common], own.detach().cpu()[:, common:prefix], resampled]
    weights["pos_embed"] = torch.cat(parts, dim=1)  # 1, prefix + H * W, C
    return True
