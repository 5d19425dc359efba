"""The flags of main.py on data and augmentation, and the configurations made of them."""

import argparse
import difflib
from argparse import BooleanOptionalAction
from dataclasses import replace
from typing import Any

import torch
from timm.data import Mixup

from util.command import (
    below_one,
    fraction,
    nonnegative_float,
    nonnegative_int,
    number,
    open_fraction,
    positive_float,
    positive_int,
)
from util.config import DATA_SETS, FOLDER_DATA_SETS, SPLIT_FIELDS, AugmentConfig, DataConfig, find_cfg
from util.errors import InputError

INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
NO_EFFECT = "accepted for old command lines, no effect"

# other names of data sets
ALIASES = {"cifar100": "CIFAR", "cifar-100": "CIFAR", "imagenet": "IMNET"}


def data_set(word: str) -> str:
    """Return the name of `DATA_SETS` that a word spells in upper or lower case. Raises ArgumentTypeError."""
    names = {name.lower(): name for name in DATA_SETS}
    if word.lower() in names:
        return names[word.lower()]
    near = difflib.get_close_matches(word.lower(), names | ALIASES, n=1)
    hint = f"did you mean {(names | ALIASES)[near[0]]}?" if near else f"choose from {', '.join(DATA_SETS)}"
    raise argparse.ArgumentTypeError(f"{word}: no such data set; {hint}")


# spellings, type, default and help, see add_flags
AUGMENT_FLAGS = (
    (
        "--color-jitter",
        nonnegative_float,
        AugmentConfig.color_jitter,
        "strength of color jitter, for --aa none and --ThreeAugment",
    ),
    ("--aa", str, AugmentConfig.aa, "timm's AutoAugment policy, or none; not with --ThreeAugment"),
    ("--smoothing", below_one, 0.1, "label smoothing"),
    ("--ThreeAugment", bool, False, "DeiT III's augmentation: grey, solarise or blur, color jitter"),
    ("--src", bool, False, "with --ThreeAugment: resize and random crop, no random resized crop"),
    (
        "--crop",
        ("rrc", "pad", "squash"),
        None,
        "rrc: random resized crop; pad: resize the short side, random crop padded by 4 px; squash: resize to height "
        "and width; pad and squash evaluate whole images; default: pad where images come in --input-size, else rrc",
    ),
    ("--scale", [open_fraction] * 2, None, "least and largest share of the image in a random resized crop"),
    ("--ratio", [positive_float] * 2, None, "least and largest width / height of a random resized crop"),
    ("--hflip", fraction, None, "probability of mirroring; default: 0.5, or 0 where it changes the class (digits)"),
    ("--vflip", fraction, AugmentConfig.vflip, "probability of turning images upside down"),
    (
        "--train-interpolation",
        ("random", "bilinear", "bicubic"),
        AugmentConfig.interpolation,
        "interpolation of the random resized crop",
    ),
    (
        "--repeated-aug",
        BooleanOptionalAction,
        True,
        "each image three times per epoch, augmented differently; an epoch has a third of the images (below 256: all)",
    ),
    ("--reprob", fraction, AugmentConfig.reprob, "probability of random erasing"),
    ("--remode", ("pixel", "rand", "const"), AugmentConfig.remode, "what random erasing fills with"),
    ("--recount", positive_int, AugmentConfig.recount, "maximum number of erased boxes per image"),
    # of timm's augmentation splits, which the published scripts did not have either
    ("--resplit", bool, False, NO_EFFECT),
    ("--mixup", nonnegative_float, 0.8, "alpha of mixup; 0: off"),
    ("--cutmix", nonnegative_float, 1.0, "alpha of cutmix; 0: off"),
    (
        "--cutmix-minmax",
        [fraction],
        None,
        "least and largest side of cutmix's box, as a share of the image's; overrides alpha",
    ),
    ("--mixup-prob", fraction, 1.0, "probability of mixup or cutmix per batch"),
    ("--mixup-switch-prob", fraction, 0.5, "probability of cutmix where both are on"),
    ("--mixup-mode", ("batch", "pair", "elem"), "batch", "draw per batch, pair or image"),
    ("--mixup-off-epoch", nonnegative_int, 0, "first epoch without mixup and cutmix; 0: never switch them off"),
)
DATA_FLAGS = (
    (
        "--data-set",
        {"type": data_set, "choices": DATA_SETS},
        "IMNET",
        "FOLDER: any train/CLASS/ and val/CLASS/; DIGITS needs no data; docs/small_data.md lists downloadable ones",
    ),
    ("--data-path", str, None, "folder of the data"),
    ("--train-split", str, "train", "folder (or .lmdb) of training images below --data-path, for class folders"),
    ("--val-split", str, "val", "the same for validation images"),
    ("--train-fraction", open_fraction, 1.0, "train on this share of each class's training images"),
    ("--val-fraction", below_one, 0.0, "hold out this share of the training images; the test split is left alone"),
    ("--folds", number(int, lambda v: v == 0 or v > 1, "0 or at least 2"), 0, "hold out one of N folds instead"),
    ("--fold", nonnegative_int, 0, "index of the fold to hold out, from 0"),
    ("--split-seed", nonnegative_int, 0, "seed of --train-fraction, --val-fraction and --folds"),
    (
        "--split",
        ("val", "test"),
        "val",
        "with --eval and --visualize: val is the hold-out, if there is one; test is the data's own validation split",
    ),
    ("--use-lmdb", BooleanOptionalAction, False, "read train.lmdb and val.lmdb, which folder2lmdb.py writes"),
    ("--inat-category", INAT_CATEGORIES, "name", "what counts as a class of iNaturalist"),
    ("--transform", ("fast", "timm"), "fast", "timm: the reference augmentation, slower"),
    ("--num_workers", nonnegative_int, None, "loader workers; default: this process's cores, at most 10"),
    ("--pin-mem", BooleanOptionalAction, True, "page-locked batches, for accelerators"),
)


def data_config(
    args: argparse.Namespace,
    device: torch.device,
    saved: DataConfig | None = None,
    resumed: DataConfig | None = None,
) -> DataConfig:
    """Return the data set that the flags describe. Raises InputError for flags that contradict each other.

    `saved` comes from a checkpoint to evaluate, and supplies what no flag gives. `resumed` comes from a run to
    continue: the flags decide, but they must split the training images as that run did.
    """
    flags = {"name": "data_set", "root": "data_path", "lmdb": "use_lmdb"}
    flags |= {name: name for name in ("inat_category", "train_split", "val_split", *SPLIT_FIELDS)}
    values = {name: getattr(args, flag) for name, flag in flags.items() if saved is None or flag in args.given}
    # how images are read is this machine's business, and not the checkpoint's
    data = replace(
        saved or DataConfig(),
        **values,
        transform=args.transform,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type != "cpu",
    )
    if data.name not in FOLDER_DATA_SETS and args.given & {"train_split", "val_split"}:
        raise InputError(f"--train-split and --val-split: --data-set {data.name} has its own splits; leave them out")
    if data.val_fraction and data.folds:
        raise InputError("--val-fraction and --folds both hold images out: give one of the two")
    if "fold" in args.given and data.fold >= data.folds:
        raise InputError(f"--fold {data.fold} must be below --folds, which is {data.folds}: change one of them")
    check_split(saved or resumed or data, data)
    if resumed is not None:
        data = replace(data, split_images=resumed.split_images)
    return replace(data, val_fraction=0.0, folds=0) if args.split == "test" else data


def check_split(saved: DataConfig, data: DataConfig) -> None:
    """Raise InputError if the flags split the training images in another way than the checkpoint's run did."""
    for name in SPLIT_FIELDS:
        before, now = getattr(saved, name), getattr(data, name)
        if before != now:
            raise InputError(
                f"--{name.replace('_', '-')} {now:g}: the checkpoint was trained with {before:g}, so training and "
                "validation images would mix; give the same value, --split test to evaluate, or start a new run"
            )


def pretrained_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return ModelConfig fields for timm's weights, as timm evaluates them, unless flags differ. Raises InputError."""
    if args.finetune:
        raise InputError("--pretrained and --finetune both start from weights: give one")
    cfg = find_cfg(args.model)
    if not cfg.has_weights:
        raise InputError(f"--pretrained: timm has no weights of {args.model}; train it, or give --finetune FILE")
    fields = {"interpolation": cfg.interpolation}
    if args.crop not in ("pad", "squash"):
        fields["crop_mode"] = cfg.crop_mode
        if "eval_crop_ratio" not in args.given:
            fields["crop_ratio"] = cfg.crop_pct
    return fields | {name: getattr(cfg, name) for name in ("mean", "std") if name not in args.given}


def augment_config(args: argparse.Namespace) -> AugmentConfig:
    """Return the augmentation that the flags describe."""
    return AugmentConfig(
        aa=args.aa,
        color_jitter=args.color_jitter,
        interpolation=args.train_interpolation,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
        three_augment=args.ThreeAugment,
        src=args.src,
        crop=args.crop,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
    )


def is_mixup_active(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Return mixup and cutmix as the flags describe them, None where both are off."""
    if not is_mixup_active(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )
