"""The flags of main.py on training images, and the configurations made of them: data set and augmentation."""

import argparse
from argparse import BooleanOptionalAction
from dataclasses import replace

import torch

from util.command import below_one, fraction, nonnegative_float, nonnegative_int, positive_int
from util.config import DATA_SETS, FOLDER_DATA_SETS, AugmentConfig, DataConfig
from util.errors import InputError

INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
NO_EFFECT = "accepted for old command lines, no effect"

# spellings, type, default and help, see add_flags
AUGMENT_FLAGS = (
    ("--color-jitter", nonnegative_float, 0.4, "used only with --aa none or --ThreeAugment"),
    ("--aa", str, "rand-m9-mstd0.5-inc1", "timm's AutoAugment policy, or none; not with --ThreeAugment"),
    ("--smoothing", below_one, 0.1, "label smoothing"),
    ("--ThreeAugment", bool, False, "DeiT III's augmentation: grey, solarise or blur, color jitter"),
    ("--src", bool, False, "with --ThreeAugment: resize and random crop, no random resized crop"),
    (
        "--train-interpolation",
        ("random", "bilinear", "bicubic"),
        "bicubic",
        "interpolation of the random resized crop",
    ),
    (
        "--repeated-aug",
        BooleanOptionalAction,
        True,
        "each image three times per epoch, differently augmented; an epoch shows a third of them (all below 256)",
    ),
    ("--reprob", fraction, 0.25, "probability of random erasing"),
    ("--remode", ("pixel", "rand", "const"), "pixel", "what random erasing fills with"),
    ("--recount", positive_int, 1, "maximum number of erased boxes per image"),
    # of timm's augmentation splits, which the published scripts did not have either
    ("--resplit", bool, False, NO_EFFECT),
    ("--mixup", nonnegative_float, 0.8, "alpha of mixup; 0: off"),
    ("--cutmix", nonnegative_float, 1.0, "alpha of cutmix; 0: off"),
    ("--cutmix-minmax", [fraction], None, "minimum and maximum side of cutmix's box; overrides alpha"),
    ("--mixup-prob", fraction, 1.0, "probability of mixup or cutmix per batch"),
    ("--mixup-switch-prob", fraction, 0.5, "probability of cutmix where both are on"),
    ("--mixup-mode", ("batch", "pair", "elem"), "batch", "draw per batch, pair or image"),
)
DATA_FLAGS = (
    (
        "--data-set",
        DATA_SETS,
        "IMNET",
        "FOLDER: any train/CLASS/ and val/CLASS/; DIGITS needs no data; docs/small_data.md lists downloadable ones",
    ),
    ("--data-path", str, None, "folder of the data"),
    ("--train-split", str, "train", "name of the folder of training images, where they are in class folders"),
    ("--val-split", str, "val", "name of the folder of validation images"),
    ("--use-lmdb", bool, False, "read train.lmdb and val.lmdb, which folder2lmdb.py writes"),
    ("--inat-category", INAT_CATEGORIES, "name", "what counts as a class of iNaturalist"),
    ("--transform", ("fast", "timm"), "fast", "timm: the reference augmentation, slower"),
    ("--num_workers", nonnegative_int, None, "loader workers; default: this process's cores, at most 10"),
    ("--pin-mem", BooleanOptionalAction, True, "page-locked batches, for accelerators"),
)


def data_config(args: argparse.Namespace, device: torch.device, saved: DataConfig | None = None) -> DataConfig:
    """Return the data set that the flags describe, or a checkpoint's, `saved`, as far as flags were not given."""
    flags = {"name": "data_set", "root": "data_path", "lmdb": "use_lmdb"}
    flags |= {name: name for name in ("inat_category", "train_split", "val_split")}
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
    return data


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
    )
