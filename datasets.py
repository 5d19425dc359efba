"""Data sets and loaders: from --data-set (names in util/config.py) and --data-path to batches.

A run sees the same images, augmented in the same way, for the same seed, epoch and number of processes, whatever the
number of workers: see data/sampler.py.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data import inaturalist
from data.images import (
    EncodedImage,
    ImageArray,
    ImageFiles,
    apply_transform,
    describe_names,
    find_classes,
    find_images,
    list_images,
)
from data.lmdb import ImageDatabase
from data.sampler import EpochSampler, SeededDataset, choose_images, split_stratified
from data.transforms import FastTransform, build_transform
from util import distributed
from util.config import (
    FOLDER_DATA_SETS,
    INATURALIST,
    TORCHVISION_SETS,
    AugmentConfig,
    DataConfig,
    ModelConfig,
    is_native_size,
    may_flip,
)
from util.errors import InputError, first_line
from util.stop_signal import ignore_signals

# DeiT's default
MAX_WORKERS = 10


class DatabaseImages(Dataset):
    """Images of an LMDB, with the training set's class numbers if `class_to_idx` is given.

    In databases written by the published script, class names are numbers, and `targets` and `files` are None.
    """

    def __init__(
        self,
        path: Path,
        transform: Callable | None,
        class_to_idx: dict[str, int] | None = None,
    ) -> None:
        self.database = ImageDatabase(path)
        self.transform = transform
        self.classes = self.database.classes
        self.files = self.database.paths
        self.targets = self.database.labels
        if class_to_idx is not None and list(class_to_idx) != self.classes:
            self._renumber(path, class_to_idx)

    def _renumber(self, path: Path, class_to_idx: dict[str, int]) -> None:
        names = self.classes
        self.classes = list(class_to_idx)
        remedy = f"the training classes are {describe_names(self.classes)}; build both splits from one folder"
        if not self.database.has_class_names:
            if len(names) > len(self.classes):
                raise InputError(f"{path}: label {len(names) - 1} is not in the training set, {remedy}")
            return
        for label in np.unique(self.database.labels):
            if names[label] not in class_to_idx:
                raise InputError(f"{path}: class {names[label]} is not in the training set, {remedy}")
        # classes without images may be unknown
        self.targets = np.array([class_to_idx.get(name, -1) for name in names])[self.database.labels]

    def __len__(self) -> int:
        return len(self.database)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        data, label = self.database[index]
        if self.targets is not None:
            # a plain int, as from the other data sets
            label = int(self.targets[index])
        image = EncodedImage(data, self.database.describe(index))
        return apply_transform(self.transform, image), label


def load_digits(train: bool, size: tuple[int, int], transform: Callable | None) -> ImageArray:
    """Return scikit-learn's 1,797 handwritten digits at `size` (height, width); 360 of them are for testing."""
    from sklearn import datasets

    digits = datasets.load_digits()
    chosen = split_stratified(digits.target, 0.2)[0 if train else 1]
    images, targets = digits.images[chosen], digits.target[chosen]
    # values are from 0 to 16
    grey = np.rint(images * (255 / 16)).astype(np.uint8)  # N, 8, 8
    pictures = [Image.fromarray(image).convert("RGB") for image in grey]
    data = np.stack([image.resize(size[::-1], Image.Resampling.BICUBIC) for image in pictures])  # N, H, W, 3
    return ImageArray(data, targets.tolist(), [str(digit) for digit in range(10)], transform)


def load_named(name: str, root: Path, train: bool, transform: Callable | None) -> ImageArray | ImageFiles:
    """Return a split of one of `TORCHVISION_SETS`. All processes call this, and rank 0 downloads what is missing.

    Grey images become RGB, with a note printed for the validation split. Raises InputError, which says what to put
    where, for missing or damaged files.
    """
    named = TORCHVISION_SETS[name]
    # processes that download or unpack to one folder would overwrite each other's files
    with distributed.primary_first():
        try:
            download = distributed.is_primary()
            splits = [named.cls(root, split, download=download) for split in (named.train if train else named.val)]
        except Exception as error:
            # of any kind: a missing host, a broken download, an archive that is cut short
            reason = first_line(error).partition(". You can")[0]
            raise InputError(
                f"{root / named.place}: missing or damaged, and not downloaded ({reason}); "
                f"put {named.url} there, and remove what was unpacked from it"
            ) from None
    images = np.concatenate([getattr(split, named.images) for split in splits])
    targets = np.concatenate([getattr(split, named.labels) for split in splits]).astype(int)
    # those without names are SVHN's ten digits
    classes = list(getattr(splits[0], "classes", "0123456789"))

    # a split of our own, where there is none
    if named.val_share:
        chosen = split_stratified(targets, named.val_share)[0 if train else 1]
        images, targets = images[chosen], targets[chosen]
    targets = targets.tolist()

    # files, or pixels in one of three layouts
    if images.dtype != np.uint8:
        # EuroSAT's come in pairs with their labels
        files = images[:, 0] if images.ndim == 2 else images
        return ImageFiles([str(file) for file in files], targets, classes, transform)
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)  # N, H, W -> N, H, W, 3
        if not train:
            distributed.print0(f"{name}: its grey images become RGB")
    elif images.shape[1] == 3:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))  # N, 3, H, W -> N, H, W, 3
    return ImageArray(images, targets, classes, transform)


def _resolve_root(data: DataConfig) -> Path:
    in_folders = data.name in FOLDER_DATA_SETS
    if data.lmdb and not in_folders:
        raise InputError(f"--use-lmdb: --data-set {data.name} does not consist of class folders; leave it out")
    # the digits come with scikit-learn
    if not data.root and data.name != "DIGITS":
        layout = f", with {data.train_split}/CLASS/ and {data.val_split}/CLASS/ in it" if in_folders else ""
        raise InputError(f"--data-set {data.name} needs data; add --data-path FOLDER{layout}")
    return Path(data.root or "")


def _resolve_split(data: DataConfig, train: bool) -> Path:
    name = data.train_split if train else data.val_split
    return _resolve_root(data) / (f"{name}.lmdb" if data.lmdb else name)


def build_dataset(
    data: DataConfig,
    train: bool,
    config: ModelConfig,
    transform: Callable | None,
    class_to_idx: dict[str, int] | None = None,
) -> Dataset:
    """Return one split, with `classes`, `transform`, and `targets` and `files`, which may be None.

    `class_to_idx` numbers the classes of folders, databases and iNaturalist; by default the split does. All processes
    call this together. Raises InputError for missing, damaged and inconsistent data.
    """
    root = _resolve_root(data)
    if data.name == "DIGITS":
        return load_digits(train, config.input_size, transform)
    if data.name in TORCHVISION_SETS:
        return load_named(data.name, root, train, transform)
    # files named by lists
    if data.name in INATURALIST:
        files, targets, classes = inaturalist.read_split(root, data.name, train, data.inat_category, class_to_idx)
        return ImageFiles([os.path.join(root, file) for file in files], targets, classes, transform)
    # class folders, or a database that was made of them
    folder = _resolve_split(data, train)
    if data.lmdb:
        return DatabaseImages(folder, transform, class_to_idx)
    class_to_idx = find_classes(folder, class_to_idx)
    files, targets = list_images(folder, class_to_idx)
    return ImageFiles(files, targets, list(class_to_idx), transform)


def build_train_set(data: DataConfig, config: ModelConfig, augment: AugmentConfig) -> Dataset:
    """Return the training split, augmented, or the part of it that `data` trains on."""
    transform = build_transform(
        True,
        config,
        augment,
        native_size=is_native_size(data.name, config.input_size),
        flip=may_flip(data.name),
    )
    if data.transform == "fast":
        transform = FastTransform(transform)
    return choose_images(build_dataset(data, True, config, transform), data, held_out=False)


def _resolve_class_to_idx(data: DataConfig, classes: Sequence[str] | None) -> dict[str, int] | None:
    """Return {class: number} of the training split, or of a checkpoint's `classes` if that split is missing.

    None if the data set fixes the numbers, or if both are missing: the validation split then numbers its own classes.
    """
    # in evaluation the training images may be missing
    if data.name in FOLDER_DATA_SETS:
        path = _resolve_split(data, train=True)
        if path.exists():
            classes = ImageDatabase(path).classes if data.lmdb else find_classes(path)
    elif data.name not in INATURALIST:
        return None
    return {name: i for i, name in enumerate(classes)} if classes else None


def build_val_set(data: DataConfig, config: ModelConfig, classes: Sequence[str] | None = None) -> Dataset:
    """Return the validation split with the training split's class numbers, or what is held out of the training split.

    A checkpoint's `classes` give the numbers if the training split is missing. Prints which classes have no images.
    """
    transform = build_transform(
        False,
        config,
        native_size=is_native_size(data.name, config.input_size),
    )
    if data.transform == "fast":
        transform = FastTransform(transform)
    if data.holds_out:
        return choose_images(build_dataset(data, True, config, transform), data, held_out=True)
    class_to_idx = _resolve_class_to_idx(data, classes)
    dataset = build_dataset(data, False, config, transform, class_to_idx)

    # the accuracy on fewer classes cannot be compared with others
    if dataset.targets is not None:
        missing = np.setdiff1d(range(len(dataset.classes)), dataset.targets)
        if len(missing):
            names = describe_names([dataset.classes[i] for i in missing])
            distributed.print0(
                f"The validation set lacks {len(missing)} of the {len(dataset.classes)} classes: {names}"
            )
    return dataset


def build_image_set(folder: str | Path, config: ModelConfig) -> ImageFiles:
    """Return the images of a folder and its subfolders, prepared as for evaluation, without labels."""
    return ImageFiles(find_images(folder), None, [], build_transform(False, config))


def evenly_spaced(dataset: Dataset, count: int) -> Iterator[tuple[Tensor, str | None, str]]:
    """Yield `count` images from all parts of a data set.

    Each is a normalized float image [3, H, W], its class if known, and the name of its file.
    """
    for k in range(count):
        i = k * len(dataset) // count
        image, target = dataset[i]
        label = None if target < 0 else dataset.classes[target]
        name = f"image {i}" if dataset.files is None else Path(dataset.files[i]).name
        yield image, label, name


def default_workers() -> int:
    """Return this process's share of the cores, at most MAX_WORKERS."""
    cores = os.cpu_count() or 1
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    # Slurm binds each process to its share of the cores; under torchrun all of them share the same cores.
    if available == cores or "LOCAL_WORLD_SIZE" in os.environ:
        available //= distributed.local_world_size()
    return max(1, min(available, MAX_WORKERS))


def _build_loader(dataset: Dataset, data: DataConfig, **kwargs) -> DataLoader:
    workers = default_workers() if data.num_workers is None else data.num_workers
    return DataLoader(
        dataset,
        num_workers=workers,
        # starting them takes seconds, in every epoch
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        pin_memory=data.pin_memory,
        # the main process ends its workers itself
        worker_init_fn=ignore_signals,
        # the seeds that the loader draws must not come from the main random stream
        generator=torch.Generator(),
        **kwargs,
    )


def build_train_loader(
    dataset: Dataset,
    data: DataConfig,
    *,
    batch_size: int,
    repeated_aug: bool,
    seed: int,
) -> DataLoader:
    """Return the loader of this process's share, in whole batches. Call its `sampler.set_epoch` before each epoch.

    Raises InputError if the share is smaller than a batch.
    """
    n = len(dataset)
    world = distributed.world_size()
    sampler = EpochSampler(n, repeated_aug, seed, distributed.rank(), world)
    if len(sampler) < batch_size:
        remedy = "lower it"
        # repeated augmentation shows a third of the images per epoch
        if repeated_aug and n // world >= batch_size:
            remedy = "lower it or add --no-repeated-aug"
        per_process = f"{len(sampler)} training images per process and epoch"
        raise InputError(f"--batch-size {batch_size}: only {per_process}, of {n} in all; {remedy}")
    return _build_loader(
        SeededDataset(dataset, seed),
        data,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=True,
    )


def build_val_loader(dataset: Dataset, data: DataConfig, *, batch_size: int) -> DataLoader:
    """Return the loader of this process's share of the validation set."""
    # without padding, so that each image counts once
    share = range(distributed.rank(), len(dataset), distributed.world_size())
    return _build_loader(dataset, data, batch_size=batch_size, sampler=share)
