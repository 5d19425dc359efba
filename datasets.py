"""Data sets, transforms and loaders. Which images a run sees depends on seed, epoch and position alone."""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from util import distributed, inat
from util.checks import FOLDERS
from util.cifar import KINDS as CIFARS
from util.cifar import open_cifar
from util.class_folders import empty_class, find_classes, some
from util.errors import InputError
from util.image_database import ImageDatabase
from util.images import EncodedImage, load_rgb, read_file
from util.preemption import shield_worker
from util.sampling import EpochSampler, Seeded, Skipped
from util.transforms import FastTransform, Part, normalise

BICUBIC = transforms.InterpolationMode.BICUBIC


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits as RGB images of `size` (height, width); 360 of them are for testing."""

    classes = [str(d) for d in range(10)]

    def __init__(self, train: bool, size: tuple[int, int], transform=None) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        split = train_test_split(digits.images, digits.target, test_size=360, stratify=digits.target, random_state=0)
        images, targets = (split[0], split[2]) if train else (split[1], split[3])
        grey = np.rint(images * (255 / 16)).astype(np.uint8)  # N, 8, 8
        self.images = [
            Image.fromarray(g).convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC) for g in grey
        ]
        self.data = np.stack([np.asarray(image) for image in self.images])  # N, height, width, 3
        self.targets = targets.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.data[index] if getattr(self.transform, "takes_encoded", False) else self.images[index]
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def _sample(path: str, transform, data: bytes | None = None) -> torch.Tensor:
    """Give what `transform` makes of an image file, or of the `data` found under that name; without one, RGB."""
    data = read_file(path) if data is None else data
    if getattr(transform, "takes_encoded", False):
        return transform(EncodedImage(data, path))
    image = load_rgb(data, path)
    return image if transform is None else transform(image)


class ClassFolders(ImageFolder):
    """Images in a folder a class, under a given class map; unreadable files are named.

    Raises InputError for a missing folder, one without class folders, a class that the map lacks, and a class folder
    without images.
    """

    def __init__(self, root: Path, transform=None, class_to_idx: dict[str, int] | None = None) -> None:
        self._map = class_to_idx
        try:
            super().__init__(str(root), transform, allow_empty=True)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise InputError(f"{root}: {str(error).splitlines()[0]}") from None
        counts = np.bincount(np.asarray(self.targets, dtype=np.int64), minlength=len(self.classes))
        for name, count in zip(self.classes, counts, strict=True):
            if not count and (Path(root) / name).is_dir():
                raise empty_class(Path(root) / name)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return find_classes(Path(directory), self._map)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, target = self.samples[index]
        return _sample(path, self.transform), target


class DatabaseImages(Dataset):
    """Images of an LMDB that folder2lmdb.py wrote, or the published one, whose classes have numbers for names.

    `class_to_idx`, the training set's, must cover the classes of the images; `targets` and `files` are None in a
    published database.
    """

    def __init__(self, path: Path, transform=None, class_to_idx: dict[str, int] | None = None) -> None:
        self.records, self.transform = ImageDatabase(path), transform
        self.records.check_table()
        self.classes = own = self.records.classes
        self.lookup = None
        if class_to_idx is None or own == list(class_to_idx):
            return
        self.classes = list(class_to_idx)
        numbered = self.classes == [str(i) for i in range(len(self.classes))]
        if self.records.named and numbered and len(self.classes) > 10:  # sorted as names, 10 comes before 2
            raise InputError(f"{path}: has names of classes, and the training classes numbers; build both from folders")
        known = f"the {len(self.classes)} training classes ({some(self.classes)})"
        if not self.records.named:
            if len(own) > len(self.classes):
                raise InputError(f"{path}: label {len(own) - 1} is not among {known}; build both from one folder")
            return
        counts = np.bincount(self.records.labels, minlength=len(own))
        unknown = [name for name, count in zip(own, counts, strict=True) if count and name not in class_to_idx]
        if unknown:
            raise InputError(f"{path}: class {unknown[0]} is not among {known}; build both from one folder")
        self.lookup = np.array([class_to_idx.get(name, -1) for name in own])

    @property
    def targets(self) -> np.ndarray | None:
        labels = self.records.labels
        return labels if self.lookup is None else self.lookup[labels]

    @property
    def files(self) -> Sequence[str] | None:
        return self.records.paths

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        data, label = self.records[index]
        label = label if self.lookup is None else int(self.lookup[label])
        return _sample(f"{self.records.path}, {self.records.name(index)}", self.transform, data), label


class ListedImages(Dataset):
    """A split of iNaturalist as its lists have it, under a given class map or the training list's."""

    def __init__(
        self, root: str, name: str, train: bool, category: str, transform=None, class_map: dict[str, int] | None = None
    ) -> None:
        self.root, self.transform = root, transform
        self.files, self.targets, self.classes = inat.read_split(Path(root), name, train, category, class_map)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return _sample(os.path.join(self.root, self.files[index]), self.transform), self.targets[index]


class UnlabelledImages(Dataset):
    """The images of a folder and of those in it, in the order of their names, without labels."""

    def __init__(self, root: str, transform=None) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise InputError(f"--image-dir {root}: no such folder")
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
        if not self.files:
            raise InputError(f"--image-dir {root}: no images in it (looked for {', '.join(IMG_EXTENSIONS)})")
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, None]:
        return _sample(str(self.files[index]), self.transform), None


def spread(dataset: Dataset, count: int) -> Iterator[tuple[torch.Tensor, str | None, str]]:
    """Yield `count` images, or all there are, evenly from a data set, with the names of their classes and files.

    The images are normalised.
    """
    n = len(dataset)
    files = getattr(dataset, "files", None) or [path for path, _ in getattr(dataset, "samples", ())]
    for i in (k * n // min(count, n) for k in range(min(count, n))):
        image, target = dataset[i]
        name = Path(files[i]).name if files else f"image {i}"
        image = normalise(image) if image.dtype == torch.uint8 else image
        yield image, None if target is None else dataset.classes[target], name


def build_transform(
    train: bool,
    size: tuple[int, int],
    *,
    small: bool = False,
    flip: bool = True,
    aa: str = "none",
    color_jitter: float = 0.4,
    interpolation: str = "bicubic",
    reprob: float = 0.0,
    remode: str = "pixel",
    recount: int = 1,
    crop_ratio: float = 0.875,
    three_augment: bool = False,
    src: bool = False,
) -> transforms.Compose:
    """Build DeiT's transform of a PIL image to a normalised [3, H, W] tensor of `size` (height, width).

    `small` is for sets whose images have that size already (CIFAR, digits): a random crop with padding 4 replaces the
    random resized crop, and evaluation neither resizes nor crops. `three_augment` is DeiT III's in place of `aa` and
    random erasing; with `src` too, resizing and a crop with reflected padding 4 replace the random resized crop.
    """
    square = size[0] if size[0] == size[1] else size
    if not train:
        return create_transform(square, interpolation="bicubic", crop_pct=1.0 if small else crop_ratio)
    if three_augment:
        aa, reprob = "3a", 0.0  # solarise, grey or blur; timm keeps the colour jitter with it
    try:
        transform = create_transform(
            square,
            is_training=True,
            hflip=0.5 if flip else 0.0,
            color_jitter=color_jitter or None,
            auto_augment=None if aa.lower() in ("", "none") else aa,
            interpolation=interpolation,
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"--aa {aa}: not a policy of timm's ({error!r}); for example rand-m9-mstd0.5-inc1") from None
    if three_augment and src:
        whole = transforms.Resize(size[0], BICUBIC) if size[0] == size[1] else ResizeKeepRatio(size, 0, "bicubic")
        crop = [whole, transforms.RandomCrop(size, padding=4, padding_mode="reflect")]
    elif small:
        crop = [transforms.RandomCrop(size, padding=4)]
    else:
        return transform
    resized_crops = (RandomResizedCropAndInterpolation, transforms.RandomResizedCrop)
    at = next(i for i, t in enumerate(transform.transforms) if isinstance(t, resized_crops))
    transform.transforms[at : at + 1] = crop
    return transform


def build_dataset(
    name: str,
    root: str | None,
    train: bool,
    size: tuple[int, int],
    transform,
    class_to_idx: dict[str, int] | None = None,
    use_lmdb: bool = False,
    inat_category: str = "name",
) -> Dataset:
    """Open one split of a data set, under `class_to_idx` where its files do not number the classes themselves.

    A split of class folders is `root`/train or val, or with `use_lmdb` train.lmdb or val.lmdb.
    """
    if name == "DIGITS":
        return Digits(train, size, transform)
    if name in CIFARS:
        return open_cifar(name, root, train, transform)
    if name in inat.YEARS:
        return ListedImages(root, name, train, inat_category, transform, class_to_idx)
    if use_lmdb:
        return DatabaseImages(Path(root) / ("train.lmdb" if train else "val.lmdb"), transform, class_to_idx)
    return ClassFolders(Path(root) / ("train" if train else "val"), transform, class_to_idx)


def default_workers() -> int:
    """Give this process's share of the machine's cores, at most 10."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(10, max(1, cores // distributed.local_world_size()))


def is_small(args: argparse.Namespace, size: tuple[int, int]) -> bool:
    """Say whether the images come in `size`: digits are made up to 32 pixels, CIFAR's have 32."""
    return max(size) == 32 if args.data_set in CIFARS else args.data_set == "DIGITS" and max(size) <= 32


def find_class_map(args: argparse.Namespace, classes: Sequence[str] | None) -> dict[str, int] | None:
    """Number the classes as the training split does; without one, as people have who only evaluate, as `classes` are.

    None where neither is there, or where the validation split is numbered without help.
    """
    root = Path(args.data_path or "")
    if args.data_set in FOLDERS:
        train = root / ("train.lmdb" if args.use_lmdb else "train")
        if train.exists():
            classes = DatabaseImages(train).classes if args.use_lmdb else find_classes(train)[0]
    elif args.data_set not in inat.YEARS or inat.find_list(root, args.data_set, True).exists():
        return None
    return {name: i for i, name in enumerate(classes)} if classes else None


def _build_split(args: argparse.Namespace, train: bool, size: tuple[int, int], transform, class_map=None) -> Dataset:
    where = args.data_set, args.data_path, train
    return build_dataset(*where, size, transform, class_map, args.use_lmdb, args.inat_category)


def build_val_dataset(args: argparse.Namespace, size: tuple[int, int], classes: Sequence[str] | None) -> Dataset:
    """Open the validation split under the training split's class map, else a checkpoint's `classes`, else its own."""
    transform = build_transform(False, size, small=is_small(args, size), crop_ratio=args.eval_crop_ratio)
    transform = FastTransform(transform) if args.transform == "fast" else transform
    dataset = _build_split(args, False, size, transform, find_class_map(args, classes))
    missing = []
    if dataset.targets is not None:
        missing = sorted(set(dataset.classes) - {dataset.classes[t] for t in np.unique(dataset.targets)})
    if missing:
        distributed.print0(
            f"The validation set lacks {len(missing)} of the {len(dataset.classes)} classes: {', '.join(missing[:5])}"
        )
    return dataset


def build_image_dataset(args: argparse.Namespace, size: tuple[int, int]) -> Dataset:
    """Open --image-dir, with the transform of the validation set."""
    transform = build_transform(False, size, small=False, crop_ratio=args.eval_crop_ratio)
    return UnlabelledImages(args.image_dir, transform)


def build_train_dataset(args: argparse.Namespace, size: tuple[int, int]) -> Dataset:
    transform = build_transform(
        True,
        size,
        small=is_small(args, size),
        flip=args.data_set != "DIGITS",  # a mirrored digit is another sign
        aa=args.aa,
        color_jitter=args.color_jitter,
        interpolation=args.train_interpolation,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
        three_augment=args.ThreeAugment,
        src=args.src,
    )
    transform = FastTransform(transform) if args.transform == "fast" else transform
    return _build_split(args, True, size, transform)


def _loader(dataset: Dataset, args: argparse.Namespace, **kwargs) -> DataLoader:
    workers = default_workers() if args.num_workers is None else args.num_workers
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        pin_memory=args.pin_mem and torch.accelerator.is_available(),
        worker_init_fn=shield_worker,
        generator=torch.Generator(),  # the loader's own draws stay out of the main stream
        **kwargs,
    )


def build_train_loader(args: argparse.Namespace, dataset: Dataset) -> DataLoader:
    """Build the loader of whole batches; its sampler wants `set_epoch` before each epoch."""
    world, n = distributed.world_size(), len(dataset)
    sampler = EpochSampler(n, args.repeated_aug, args.seed, distributed.rank(), world)
    if len(sampler) < args.batch_size:
        raise InputError(
            f"--batch-size {args.batch_size}: {n} training images give each of {world} process(es) {len(sampler)}, "
            "not one whole batch; lower it"
            + (", or add --no-repeated-aug" if args.repeated_aug and n // world >= args.batch_size else "")
        )
    skipped = Skipped(len(sampler)) if args.on_bad_image == "skip" else None
    seeded = Seeded(dataset, args.seed, skipped)
    return _loader(seeded, args, batch_size=args.batch_size, sampler=sampler, drop_last=True)


def build_val_loader(args: argparse.Namespace, dataset: Dataset) -> DataLoader:
    """Build this process's share of the validation set: every image is in exactly one share."""
    share = range(distributed.rank(), len(dataset), distributed.world_size())
    return _loader(dataset, args, batch_size=max(1, int(1.5 * args.batch_size)), sampler=share)


def build_benchmark_loaders(args: argparse.Namespace, size: tuple[int, int]) -> dict[str, DataLoader]:
    """Build the training loader with each --transform, and for image files loaders that only decode, or only read.

    They are for `measure.benchmark_loaders`.
    """
    loaders = {}
    for name in ("timm", "fast", *(("decode", "read") if args.data_set in (*FOLDERS, *inat.YEARS) else ())):
        each = argparse.Namespace(**vars(args) | {"transform": "timm" if name == "timm" else "fast"})
        dataset = build_train_dataset(each, size)
        if name in ("decode", "read"):
            dataset.transform = Part(name == "decode")
        loaders[name] = build_train_loader(each, dataset)
    return loaders
