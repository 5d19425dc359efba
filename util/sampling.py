"""Which image comes when, and how it is augmented: from seed, epoch and position alone, for any number of workers."""

import multiprocessing
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, DistributedSampler, Sampler, get_worker_info

from util.errors import InputError

REPEATS = 3  # augmentations of an image in a row under --repeated-aug
BAD_SHARE = 0.05  # of an epoch's images that others may take the place of
TRIES = 20  # images that may take the place of one


class Skipped:
    """Count, over all workers of a process, the images of an epoch that others took the place of."""

    def __init__(self, images: int) -> None:
        self.images, self.limit = images, max(1, int(BAD_SHARE * images))
        self.counter = multiprocessing.Value("q", 0)
        self.told: set[str] = set()

    def add(self, error: InputError) -> None:
        """Tell of an image once; raises InputError where they are too many."""
        with self.counter.get_lock():
            self.counter.value += 1
            count = self.counter.value
        if count > self.limit:
            raise InputError(
                f"{count} of {self.images} images of this epoch could not be read, more than {BAD_SHARE:.0%}; {error}"
            )
        if str(error) not in self.told:
            self.told.add(str(error))
            print(f"skipped {error}", file=sys.stderr, flush=True)

    def take(self) -> int:
        """Give the count, and begin another."""
        with self.counter.get_lock():
            count, self.counter.value = self.counter.value, 0
        return count


class Seeded(Dataset):
    """Draw each sample's augmentation from (seed, epoch, position), outside the main random streams.

    Takes the keys that `EpochSampler` gives, so any number of workers yields the same images. With `skipped`, another
    image takes the place of one that cannot be read, drawn from the same numbers.
    """

    def __init__(self, dataset: Dataset, seed: int, skipped: Skipped | None = None) -> None:
        self.dataset, self.seed, self.skipped = dataset, seed, skipped

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[torch.Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int, int]]) -> list[tuple[torch.Tensor, int]]:
        """Give a batch's samples; the loader prefers this. The main streams' states are put aside once for all."""
        here = get_worker_info() is None
        if here:
            states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            return [self._draw(*key) for key in keys]
        finally:
            if here:
                random.setstate(states[0])
                np.random.set_state(states[1])
                torch.set_rng_state(states[2])

    def _draw(self, index: int, *moment: int) -> tuple[torch.Tensor, int]:
        for attempt in range(TRIES):
            a, b, c = (
                np.random.SeedSequence((self.seed, *moment, *[attempt] * bool(attempt))).generate_state(3).tolist()
            )
            random.seed(a)
            np.random.seed(b)
            torch.default_generator.manual_seed(c)
            index = random.randrange(len(self)) if attempt else index
            try:
                return self.dataset[index]
            except InputError as error:
                if self.skipped is None or attempt == TRIES - 1:
                    raise
                self.skipped.add(error)
        raise AssertionError("the last attempt returns or raises")


class EpochSampler(Sampler):
    """Give keys (index, epoch, position over all processes) in the order of timm's or torch's distributed sampler."""

    def __init__(self, n: int, repeated_aug: bool, seed: int, rank: int, world: int) -> None:
        self.rank, self.world, self.seed, self.epoch, self.start = rank, world, seed, 0, 0
        self.repeated_aug = repeated_aug
        if repeated_aug:
            # below 256 images the published rounding would take none: all are taken, where timm takes a third
            ratio = world / REPEATS if n < 256 else 0
            self.base = RepeatAugSampler(range(n), world, rank, num_repeats=REPEATS, selected_ratio=ratio)
        else:
            self.base = DistributedSampler(range(n), world, rank)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Begin an epoch, after this process's first `start` images; the length stays that of the whole."""
        self.epoch, self.start = epoch, start
        self.base.set_epoch(self.seed + epoch)  # the permutation comes from this sum alone

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for i, index in islice(enumerate(self.base), self.start, None):
            yield index, self.epoch, self.rank + i * self.world

    def distinct_images(self, n: int, batch_size: int) -> int:
        """Count the images that an epoch of whole batches shows, all processes together."""
        shown = len(self) // batch_size * batch_size * self.world
        return min(n, -(-shown // REPEATS) if self.repeated_aug else shown)
