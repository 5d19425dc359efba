"""Which image comes when, and how it is augmented: from seed, epoch and position alone, for any number of workers."""

import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, DistributedSampler, Sampler, get_worker_info

REPEATS = 3  # augmentations of an image in a row under --repeated-aug


class Seeded(Dataset):
    """Draw each sample's augmentation from (seed, epoch, position), outside the main random streams.

    Takes the keys that `EpochSampler` gives, so any number of workers yields the same images.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

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

    def _draw(self, index: int, epoch: int, position: int) -> tuple[torch.Tensor, int]:
        a, b, c = np.random.SeedSequence((self.seed, epoch, position)).generate_state(3).tolist()
        random.seed(a)
        np.random.seed(b)
        torch.default_generator.manual_seed(c)
        return self.dataset[index]


class EpochSampler(Sampler):
    """Give keys (index, epoch, position over all processes) in the order of timm's or torch's distributed sampler."""

    def __init__(self, n: int, repeated_aug: bool, seed: int, rank: int, world: int) -> None:
        self.rank, self.world, self.seed, self.epoch = rank, world, seed, 0
        self.repeated_aug = repeated_aug
        if repeated_aug:
            # below 256 images the published rounding would take none: all are taken, where timm takes a third
            ratio = world / REPEATS if n < 256 else 0
            self.base = RepeatAugSampler(range(n), world, rank, num_repeats=REPEATS, selected_ratio=ratio)
        else:
            self.base = DistributedSampler(range(n), world, rank)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.base.set_epoch(self.seed + epoch)  # the permutation comes from this sum alone

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for i, index in enumerate(self.base):
            yield index, self.epoch, self.rank + i * self.world

    def distinct_images(self, n: int, batch_size: int) -> int:
        """Count the images that an epoch of whole batches shows, all processes together."""
        shown = len(self) // batch_size * batch_size * self.world
        return min(n, -(-shown // REPEATS) if self.repeated_aug else shown)
