"""What a run is made of, as plain values: every checkpoint holds them, so that its model can be built again."""

import difflib
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from util.errors import InputError

DOMAIN_NET = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
FOLDER_DATA_SETS = ("FOLDER", "IMNET", *DOMAIN_NET)  # train/CLASS/ and val/CLASS/, or LMDB
CIFAR_DATA_SETS = ("CIFAR", "CIFAR-10")
INATURALIST = {"INAT": 2018, "INAT19": 2019}
DATA_SETS = ("DIGITS", *FOLDER_DATA_SETS, *CIFAR_DATA_SETS, *INATURALIST)


@dataclass(frozen=True)
class ModelConfig:
    """A model as timm registers it, and how its images are prepared for evaluation.

    `kwargs` are passed on to the model. `num_classes` None is the model's own default. `crop_ratio` is the share of
    the resized image that the center crop keeps; with 1 images are resized to `input_size` (height, width).
    """

    name: str
    num_classes: int | None = None
    input_size: tuple[int, int] = (224, 224)
    kwargs: dict[str, Any] = field(default_factory=dict)
    crop_ratio: float = 0.875
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD


@dataclass(frozen=True)
class DataConfig:
    """A data set (a name of `DATA_SETS`), where it is, and how it is read."""

    name: str = "IMNET"
    root: str | None = None
    lmdb: bool = False
    inat_category: str = "name"
    transform: str = "fast"
    num_workers: int | None = None
    pin_memory: bool = False


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are augmented, besides mixup and cutmix."""

    aa: str = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    interpolation: str = "bicubic"
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    three_augment: bool = False
    src: bool = False


def describe_size(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))


def is_native_size(data_name: str, input_size: tuple[int, int]) -> bool:
    """Return whether the data set's images come in that size, so that they are neither resized nor cropped."""
    if data_name == "DIGITS":
        return max(input_size) <= 32  # they are drawn at the size that is asked for
    return data_name in CIFAR_DATA_SETS and input_size == (32, 32)


def find_cfg(name: str, flag: str = "--model") -> timm.models.PretrainedCfg:
    """Return timm's configuration of a model. Raises InputError, naming the flag, for an unknown one."""
    if not timm.is_model(name):
        names = timm.list_models()
        part = name.lower().replace("-", "_")
        near = [n for n in names if part in n] or difflib.get_close_matches(name, names) or timm.list_models("dhvt*")
        raise InputError(f"{flag} {name}: no such model; for example {', '.join(near[:4])}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise InputError(f"{flag} {name}: {error}; leave out what follows the dot") from None


def resolve_input_size(name: str, size: tuple[int, int] | None, flag: str = "--model") -> tuple[int, int]:
    """Return (height, width): the size that was given, else the model's own."""
    cfg = find_cfg(name, flag)
    return tuple(cfg.input_size[-2:]) if size is None else size
