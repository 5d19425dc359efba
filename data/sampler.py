"""Which training images are used and which are held out; the order of an epoch, and the seeds of its augmentation.

Splits depend only on the labels and --split-seed, order and augmentation only on seed, epoch and position. So a run
sees the same images for any number of loader workers, and when resumed in the middle of an epoch.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, Sampler, Subset

from util.config import DataConfig
from util.distributed import seed_everything
from util.errors import InputError

# augmentations of each image under --repeated-aug
REPEATS = 3


@dataclass
class EpochSampler(Sampler):
    """Yield (index, epoch, position) of this process's share of an epoch.

    The order is that of timm's RepeatAugSampler with `repeated_aug`, else of torch's DistributedSampler. Positions are
    counted over all processes.
    """

    n: int
    repeated_aug: bool
    seed: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        if self.repeated_aug:
            # Below 256 images DeiT's rounding selects none and timm a third of them. We take all.
            self.sampler = RepeatAugSampler(
                range(self.n),
                self.world,
                self.rank,
                num_repeats=REPEATS,
                selected_ratio=self.world / REPEATS if self.n < 256 else 0,
            )
        else:
            self.sampler = DistributedSampler(range(self.n), self.world, self.rank)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Begin an epoch at image `start` of this process's share; the length stays that of the whole share."""
        self.epoch = epoch
        # images of this share that a resumed run has seen already
        self.start = start
        # both samplers seed their permutation with this number alone
        self.sampler.set_epoch(self.seed + epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple]:
        for i, index in islice(enumerate(self.sampler), self.start, None):
            yield index, self.epoch, self.rank + i * self.world

    def distinct_images(self, batch_size: int) -> int:
        """Return how many different images all processes together see in an epoch of whole batches."""
        # the last incomplete batch is dropped
        shown = len(self) // batch_size * batch_size * self.world
        if self.repeated_aug:
            shown = -(-shown // REPEATS)
        return min(self.n, shown)


@dataclass
class SeededDataset(Dataset):
    """A data set that takes the keys of `EpochSampler` and seeds each sample's augmentation from them."""

    dataset: Dataset
    seed: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[tuple]) -> list[tuple[Tensor, int]]:
        """Return a batch of samples (the loader calls this), with the global random streams as they were before."""
        # without workers these are the streams of mixup, dropout and random erasing
        python_state = random.getstate()
        numpy_state = np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                return [self._draw(*key) for key in keys]
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)

    def _draw(self, index: int, epoch: int, position: int) -> tuple[Tensor, int]:
        # torch.manual_seed would seed the accelerator's stream too
        seed_everything(self.seed, epoch, position, torch_seed=torch.default_generator.manual_seed)
        return self.dataset[index]


class ImageSubset(Subset):
    """A subset with the data set's attributes; images without a file are named by their index in the data set."""

    def __init__(self, dataset: Dataset, indices: list[int]) -> None:
        super().__init__(dataset, indices)
        self.classes = dataset.classes
        self.transform = dataset.transform
        self.targets = [dataset.targets[i] for i in indices]

    @cached_property
    def files(self) -> list[str]:
        files = self.dataset.files
        return [f"image {i}" if files is None else files[i] for i in self.indices]


def split_stratified(
    targets: np.ndarray,
    size: float,
    seed: int = 0,
    fold: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (rest, drawn), the indices of a stratified split, which depends on the arguments alone.

    `size` is the share that is drawn, or the number of folds, of which `fold` is drawn.
    """
    # importing scikit-learn takes seconds, and most runs do not split
    from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

    if size > 1:
        splitter = StratifiedKFold(size, shuffle=True, random_state=seed)
    else:
        splitter = StratifiedShuffleSplit(1, test_size=size, random_state=seed)
    return list(splitter.split(targets, targets))[fold]


def choose_images(dataset: Dataset, data: DataConfig, held_out: bool) -> Dataset:
    """Return the part of a training split to train on, or the part that is held out of it, in the split's order.

    Every process and every run chooses the same. Raises InputError where a class is too small to be in each part.
    """
    if data.train_fraction == 1 and not data.holds_out:
        return dataset
    if dataset.targets is None:
        raise InputError(
            "--train-fraction, --val-fraction and --folds need a list of labels, which databases of the published "
            "script lack; build the database anew: python folder2lmdb.py --dir FOLDER"
        )
    targets = np.asarray(dataset.targets)
    chosen = np.arange(len(targets))

    # As if the data set were that small
    if data.train_fraction < 1:
        check_counts(targets, dataset.classes, "--train-fraction", data.train_fraction)
        _, chosen = split_stratified(targets, data.train_fraction, data.split_seed)

    # Then hold out a part of what is left
    if data.holds_out:
        if data.split_images not in (None, len(targets)):
            raise InputError(
                f"the training split has {len(targets)} images, and had {data.split_images} when the checkpoint was "
                "trained, so training and held-out images would mix: restore them, or evaluate with --split test"
            )
        rest = targets[chosen]
        flag, size = ("--folds", data.folds) if data.folds else ("--val-fraction", data.val_fraction)
        check_counts(rest, dataset.classes, flag, size)
        train, val = split_stratified(rest, size, data.split_seed, data.fold)
        chosen = chosen[val if held_out else train]
    return ImageSubset(dataset, np.sort(chosen).tolist())


def check_counts(targets: np.ndarray, classes: list[str], flag: str, size: float) -> None:
    """Raise InputError, naming the smallest class, if a split could leave a part without images of some class.

    `size` is that of `split_stratified`. Classes without any images are ignored.
    """
    # rounded, as 1 - 0.9 is less than 0.1
    needed = size if size > 1 else math.ceil(round(1 / min(size, 1 - size), 6))
    label, count = Counter(targets.tolist()).most_common()[-1]
    if count < needed:
        raise InputError(
            f"{flag} {size:g}: class {classes[label]} has {count} training images, and needs {needed} with this "
            f"value; change {flag}, or add images to the class or leave it out"
        )
