"""CIFAR-10 and CIFAR-100 by torchvision, downloaded by one process; what goes wrong is one line."""

import tarfile
from http.client import HTTPException
from pathlib import Path

from torchvision.datasets import CIFAR10, CIFAR100

from util import distributed
from util.errors import InputError


class _Arrays:
    """torchvision's CIFAR, that hands the array to a transform that takes it."""

    def __getitem__(self, index: int) -> tuple:
        if getattr(self.transform, "takes_encoded", False):
            return self.transform(self.data[index]), self.targets[index]
        return super().__getitem__(index)


class Cifar10(_Arrays, CIFAR10):
    pass


class Cifar100(_Arrays, CIFAR100):
    pass


KINDS = {"CIFAR": Cifar100, "CIFAR-10": Cifar10}


def open_cifar(name: str, root: str, train: bool, transform=None) -> CIFAR10:
    """Open one split: its images are one uint8 array [N, 32, 32, 3], `data`. All processes call this together.

    Rank 0 downloads or unpacks what `root` lacks, while the others wait; raises InputError on all of them if it cannot.
    """
    kind = KINDS[name]

    def attempt(download: bool) -> tuple[CIFAR10 | None, str]:
        existed = Path(root).exists()
        try:
            return kind(root, train, transform, download=download), ""
        except (OSError, RuntimeError, HTTPException, tarfile.TarError, EOFError) as error:
            if download and not existed and Path(root).is_dir() and not any(Path(root).iterdir()):
                Path(root).rmdir()
            reason = (str(error) or type(error).__name__).splitlines()[0].partition(". You can")[0]
            reason = reason if download else "rank 0 has it, but not this machine"
            return None, (
                f"{Path(root) / kind.filename}: missing or damaged, and not downloaded ({reason}); put {kind.url} "
                f"there, and remove {kind.base_folder}/ if there is one"
            )

    dataset, problem = attempt(download=True) if distributed.is_primary() else (None, "")
    problem = distributed.broadcast_object(problem)  # the others wait here
    if not problem and dataset is None:
        dataset, problem = attempt(download=False)
    if problem:
        raise InputError(problem)
    return dataset
