"""Which image comes when and how it is augmented: it depends on seed, epoch and position alone.

So any number of loader workers, and a run that was resumed in the middle of an epoch, sees the same images.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, Sampler

from util.distributed import seed_everything

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
            self.order = RepeatAugSampler(
                range(self.n),
                self.world,
                self.rank,
                num_repeats=REPEATS,
                selected_ratio=self.world / REPEATS if self.n < 256 else 0,
            )
        else:
            self.order = DistributedSampler(range(self.n), self.world, self.rank)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Begin an epoch at image `start` of this process's share; the length stays that of the whole share."""
        self.epoch = epoch
        # images of this share that a resumed run has seen already
        self.start = start
        # both samplers seed their permutation with this number alone
        self.order.set_epoch(self.seed + epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple]:
        for i, index in islice(enumerate(self.order), self.start, None):
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
        torch_state = torch.get_rng_state()
        try:
            return [self._draw(*key) for key in keys]
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_rng_state(torch_state)

    def _draw(self, index: int, epoch: int, position: int) -> tuple[Tensor, int]:
        # torch.manual_seed would seed the accelerator's stream too
        seed_everything(self.seed, epoch, position, torch_seed=torch.default_generator.manual_seed)
        return self.dataset[index]
