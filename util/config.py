"""What a run is made of, as plain values: every checkpoint holds them, so that its model can be built again."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import datasets

from util.errors import InputError

DOMAIN_NET = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
FOLDER_DATA_SETS = ("FOLDER", "IMNET", *DOMAIN_NET)  # train/CLASS/ and val/CLASS/, or LMDB
INATURALIST = {"INAT": 2018, "INAT19": 2019}


class TorchvisionSet(NamedTuple):
    """A data set that torchvision downloads and reads, and how its images are treated.

    `url` is what to download by hand to `place`, a path below --data-path. `side` is that of all images in pixels,
    None if they differ; with `flip` a mirrored image keeps its class.
    """

    cls: type[datasets.VisionDataset]
    url: str
    place: str = ""
    # second arguments of `cls`; several are put together
    train: tuple = ("train",)
    val: tuple = ("test",)
    # for data without splits: the share of each class that is for validation
    val_share: float = 0.0
    # attributes of `cls`: files or pixels, and class numbers
    images: str = "_image_files"
    labels: str = "_labels"
    side: int | None = None
    flip: bool = True


OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
IDX_FILES = "{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"
# `cls` takes a flag instead of a name
BY_FLAG = {"train": (True,), "val": (False,), "images": "data", "labels": "targets"}

TORCHVISION_SETS = {
    # as in DeiT, CIFAR is CIFAR-100
    "CIFAR": TorchvisionSet(
        datasets.CIFAR100,
        datasets.CIFAR100.url,
        datasets.CIFAR100.filename,
        **BY_FLAG,
        side=32,
    ),
    "CIFAR-10": TorchvisionSet(
        datasets.CIFAR10,
        datasets.CIFAR10.url,
        datasets.CIFAR10.filename,
        **BY_FLAG,
        side=32,
    ),
    "SVHN": TorchvisionSet(
        datasets.SVHN,
        "http://ufldl.stanford.edu/housenumbers/{train,test}_32x32.mat",
        images="data",
        labels="labels",
        side=32,
        flip=False,
    ),
    "MNIST": TorchvisionSet(
        datasets.MNIST, f"{datasets.MNIST.mirrors[0]}{IDX_FILES}", "MNIST/raw", **BY_FLAG, side=28, flip=False
    ),
    # mirrored clothes are still clothes
    "FASHION": TorchvisionSet(
        datasets.FashionMNIST, f"{datasets.FashionMNIST.mirrors[0]}{IDX_FILES}", "FashionMNIST/raw", **BY_FLAG, side=28
    ),
    "STL10": TorchvisionSet(
        datasets.STL10, datasets.STL10.url, datasets.STL10.filename, images="data", labels="labels", side=96
    ),
    "EUROSAT": TorchvisionSet(
        datasets.EuroSAT,
        "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
        "eurosat/EuroSAT.zip",
        # the second argument is a transform
        train=(None,),
        val=(None,),
        val_share=0.2,
        images="imgs",
        labels="targets",
        side=64,
    ),
    # papers train on both
    "FLOWERS": TorchvisionSet(
        datasets.Flowers102,
        f"{OXFORD}/flowers/102/{{102flowers.tgz,imagelabels.mat,setid.mat}}",
        "flowers-102",
        train=("train", "val"),
    ),
    "DTD": TorchvisionSet(
        datasets.DTD, f"{OXFORD}/dtd/download/dtd-r1.0.1.tar.gz", "dtd/dtd-r1.0.1.tar.gz", train=("train", "val")
    ),
    "PETS": TorchvisionSet(
        datasets.OxfordIIITPet,
        f"{OXFORD}/pets/data/{{images,annotations}}.tar.gz",
        "oxford-iiit-pet",
        train=("trainval",),
        images="_images",
    ),
    "AIRCRAFT": TorchvisionSet(
        datasets.FGVCAircraft,
        f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
        "fgvc-aircraft-2013b.tar.gz",
        train=("trainval",),
    ),
    "FOOD": TorchvisionSet(datasets.Food101, "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "food-101.tar.gz"),
}
# fields of DataConfig, and flags, that decide which images of a training split are for training
SPLIT_FIELDS = ("train_fraction", "val_fraction", "folds", "fold", "split_seed")
DATA_SETS = ("DIGITS", *FOLDER_DATA_SETS, *TORCHVISION_SETS, *INATURALIST)


# of --drop-path, which models without stochastic depth may ignore
DEFAULT_DROP_PATH = 0.1


@dataclass(frozen=True)
class ModelConfig:
    """A model as timm registers it, and how its images are prepared for evaluation.

    `kwargs` are passed on to the model; `num_classes` None keeps its default. Images are resized to `input_size`
    (height, width) / `crop_ratio`, by `interpolation` (timm's names), and center-cropped to `input_size`. Resizing fits
    the short side and keeps the aspect ratio, unless `crop_mode` is "squash".
    """

    name: str
    num_classes: int | None = None
    input_size: tuple[int, int] = (224, 224)
    kwargs: dict[str, Any] = field(default_factory=dict)
    crop_ratio: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD


@dataclass(frozen=True)
class DataConfig:
    """A data set (a name of `DATA_SETS`), where it is, and how it is read.

    For `FOLDER_DATA_SETS`, `train_split` and `val_split` name folders or databases below `root`. A run uses
    `train_fraction` of the training split, and holds out `val_fraction` of that, or `fold` of `folds`, for validation.
    """

    name: str = "IMNET"
    root: str | None = None
    lmdb: bool = False
    inat_category: str = "name"
    train_split: str = "train"
    val_split: str = "val"
    transform: str = "fast"
    num_workers: int | None = None
    pin_memory: bool = False
    train_fraction: float = 1.0
    val_fraction: float = 0.0
    folds: int = 0
    fold: int = 0
    split_seed: int = 0
    # number of images in the training split that was split
    split_images: int | None = None

    @property
    def holds_out(self) -> bool:
        """Return whether validation images come from the training split."""
        return self.folds > 0 or self.val_fraction > 0

    def describe_validation(self) -> str:
        """Return where validation images come from, for example "fold 0 of 5 of the training split"."""
        if self.folds:
            return f"fold {self.fold} of {self.folds} of the training split"
        if self.val_fraction:
            return f"{self.val_fraction:g} of the training split, held out"
        return "the data set's own split"


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are augmented, besides mixup and cutmix.

    None is timm's default for `scale` and `ratio` (of the random resized crop), the data set's for `hflip` and `crop`.
    """

    aa: str = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    interpolation: str = "bicubic"
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    three_augment: bool = False
    src: bool = False
    crop: str | None = None
    scale: Sequence[float] | None = None
    ratio: Sequence[float] | None = None
    hflip: float | None = None
    vflip: float = 0.0


def is_evit(model: str) -> bool:
    """Return whether a model reorganises tokens, which its name says."""
    return model.endswith("_shrink_base")


def describe_size(size: tuple[int, int]) -> str:
    """Return "HEIGHTxWIDTH" in pixels."""
    return "x".join(map(str, size))


def is_native_size(data_name: str, input_size: tuple[int, int]) -> bool:
    """Return whether the data set's images come in that size, so that they are neither resized nor cropped."""
    if data_name == "DIGITS":
        return max(input_size) <= 32  # they are drawn at the size that is asked for
    named = TORCHVISION_SETS.get(data_name)
    return named is not None and input_size == (named.side, named.side)


def may_flip(data_name: str) -> bool:
    """Return whether a mirrored image of the data set keeps its class."""
    # a mirrored digit is not a digit
    if data_name == "DIGITS":
        return False
    return data_name not in TORCHVISION_SETS or TORCHVISION_SETS[data_name].flip


def find_cfg(name: str, flag: str = "--model") -> timm.models.PretrainedCfg:
    """Return timm's configuration of a model. Raises InputError, naming the flag, for an unknown one."""
    if not timm.is_model(name):
        names = timm.list_models()
        part = name.lower().replace("-", "_")
        near = [n for n in names if part in n] or difflib.get_close_matches(name, names) or timm.list_models("dhvt*")
        raise InputError(f"{flag} {name}: no such model; for example {', '.join(near[:4])}; --import FILE adds yours")
    try:
        # one's own may have none
        return timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    except RuntimeError as error:
        raise InputError(f"{flag} {name}: {error}; leave out what follows the dot") from None


def resolve_input_size(name: str, size: tuple[int, int] | None, flag: str = "--model") -> tuple[int, int]:
    """Return (height, width): the size that was given, else the model's own."""
    cfg = find_cfg(name, flag)
    return tuple(cfg.input_size[-2:]) if size is None else size
