"""A trained model again, with its classes and its images' preparation: from a checkpoint or from an exported folder."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torchvision import transforms

import datasets
from builders import build_model, count_head, find_input_size
from util import checkpoint, options
from util.errors import InputError
from util.parser import Parser

# flags of a run that say what its model is and sees, and what a checkpoint may hold in their places
NUMBERS, SCALARS = (int, float), (int, float, str, bool, type(None))
FLAGS: dict[str, tuple[type, ...]] = {
    "model": (str,), "model_kwargs": (dict,), "input_size": (list, type(None)), "nb_classes": (int, type(None)),
    "data_set": (str,), "eval_crop_ratio": NUMBERS, "base_keep_rate": NUMBERS, "fuse_token": (bool,),
    "drop_loc": (str,),
}  # fmt: skip
FETCHING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}  # of timm


@dataclass
class Trained:
    """A model in evaluation mode, and the names of its classes, or None."""

    model: nn.Module
    name: str
    classes: list[str] | None
    size: tuple[int, int]  # height, width
    crop_ratio: float  # 1 where images are not cropped, but resized

    @property
    def transform(self) -> transforms.Compose:
        return datasets.build_transform(False, self.size, crop_ratio=self.crop_ratio)


def add_flags(parser: Parser) -> None:
    """Add --checkpoint, and what a checkpoint of another program does not say."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE|URL|FOLDER", help="of main.py; or what export.py wrote")
    add("--use-ema", action="store_true", help="the checkpoint's EMA weights")
    group = parser.add_argument_group("of the model, where the checkpoint does not say it").add_argument
    group("--model", default=None)
    group("--model-kwargs", nargs="*", default=None, action=options.KeyValues, metavar="KEY=VALUE")
    group("--input-size", nargs="+", type=int, default=None, help="pixels, or height and width")
    group("--nb-classes", type=int, default=None)
    group("--eval-crop-ratio", type=float, default=None)
    group("--base_keep_rate", type=float, default=None, help="of EViT")
    group("--fuse_token", action="store_true", default=None, help="of EViT")
    group("--drop_loc", default=None, help="of EViT")


def load(args: argparse.Namespace) -> Trained:
    """Build the model of --checkpoint with its weights. Raises InputError."""
    if Path(args.checkpoint).is_dir():
        return _load_folder(args)
    saved = checkpoint.load(args.checkpoint)
    flags = find_flags(checkpoint.flags_of(saved), args)
    size = find_input_size(flags)
    key = "model_ema" if args.use_ema else "model"
    weights = saved.get(key)
    if not (isinstance(weights, dict) and weights):
        raise InputError(f"{args.checkpoint}: no {key} in it; leave out --use-ema")
    classes = _names(saved.get("classes"))
    num_classes = flags.nb_classes or len(classes or ()) or count_head(flags.model, weights)
    model = build_model(flags, num_classes, size)
    checkpoint.load_weights(model, weights, args.checkpoint, f"{key} weights")
    small = datasets.is_small(flags, size)
    return Trained(model.eval(), flags.model, classes, size, 1.0 if small else flags.eval_crop_ratio)


def find_flags(saved: dict[str, Any], args: argparse.Namespace) -> argparse.Namespace:
    """Give main.py's flags as the run had them, `saved`, and as `args` has them where it does.

    What a checkpoint says is not believed beyond its type. Raises InputError.
    """
    flags = options.build_parser().parse_args([])
    if not saved and args.model is None:
        raise InputError(f"{args.checkpoint}: does not say of what model it is; add --model NAME")
    for name, kinds in FLAGS.items():
        value = saved.get(name, getattr(flags, name))
        given = getattr(args, name, None)
        value = value if given is None else given
        good = type(value) in kinds
        if name == "input_size" and isinstance(value, list):
            good = len(value) in (1, 2) and all(type(v) is int and 0 < v <= 4096 for v in value)
        elif name == "model_kwargs" and good:
            value = {k: v for k, v in value.items() if k not in FETCHING}
            good = all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
        elif kinds is NUMBERS and good:
            good = math.isfinite(value) and 0 < value <= 1
        if not good:
            raise InputError(f"{args.checkpoint}: its --{name} is {str(checkpoint.plain(value, 1))[:60]}; give another")
        setattr(flags, name, value)
    return flags


def _is_plain(value: Any) -> bool:
    return isinstance(value, SCALARS) or (
        isinstance(value, list | tuple) and len(value) < 100 and all(isinstance(v, SCALARS) for v in value)
    )


def _names(classes: Any) -> list[str] | None:
    return classes if isinstance(classes, list) and all(isinstance(name, str) for name in classes) else None


def _load_folder(args: argparse.Namespace) -> Trained:
    """Load what export.py wrote, or another folder in timm's layout."""
    folder = Path(args.checkpoint)
    if checkpoint.find_all(folder):
        raise InputError(f"{folder}: a run's folder; name the file, such as {folder / 'best_checkpoint.pth'}")
    if args.use_ema:
        raise InputError(f"{folder}: an exported folder has one set of weights; leave out --use-ema")
    try:
        config = json.loads((folder / "config.json").read_bytes())
        prepared = config["pretrained_cfg"]
        if not (folder / "model.safetensors").is_file():
            raise ValueError("no model.safetensors in it")
        if not timm.is_model(config["architecture"]):
            raise ValueError(f"no model {config['architecture']!r} here")
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        size = tuple(prepared["input_size"][-2:])
        classes, crop = _names(config.get("label_names")), float(prepared["crop_pct"])
        if not (all(type(v) is int and v > 0 for v in size) and 0 < crop <= 1):
            raise ValueError(f"an image size of {size} and a crop of {crop}")
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder}: not a folder that export.py wrote ({reason}); export it again") from None
    return Trained(model.eval(), config["architecture"], classes, size, crop)


def pick(scores: torch.Tensor, names: Sequence[str] | None, k: int) -> list[dict[str, Any]]:
    """Give an image's `k` best classes from its logits [classes]."""
    probabilities, indices = scores.float().softmax(0).topk(min(k, len(scores)))
    label = (lambda i: str(i)) if names is None else lambda i: names[i]
    found = zip(indices.tolist(), probabilities.tolist(), strict=True)
    return [{"class": label(i), "index": i, "probability": p} for i, p in found]
