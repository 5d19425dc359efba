"""What several test files share: image folders, runs so small that they take seconds, and a runner of processes."""

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from crash_runner import Runner, hide_bf16
from PIL import Image
from sklearn.datasets import load_sample_images
from tensorboardX.proto.event_pb2 import Event
from torch.optim.optimizer import register_optimizer_step_post_hook

import main

SMALL = "--model dhvt_tiny_cifar_patch4 --model-kwargs depth=1 embed_dim=32 num_heads=2 --device cpu --num_workers 0"
TINY = (
    f"{SMALL} --data-set DIGITS --no-repeated-aug --batch-size 128 --epochs 1 --warmup-epochs 0 --aa none"  # 11 updates
)


# A shell starts background commands with SIGINT ignored, and processes inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with timm's own tests, the longest, so that the processes end together; skip what needs a GPU."""
    items.sort(key=lambda item: "test_timm_contract" not in item.nodeid)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Limit torch to one thread per process: pytest starts one process per core."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def float32_by_default() -> Iterator[None]:
    """Hide that the CPU may compute bf16, in the processes of `runner` too."""
    undo = hide_bf16()
    yield
    undo()


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a folder of train/CLASS/ and val/CLASS/ images of uneven sizes, and returns it."""
    photographs = load_sample_images().images

    def write(
        train: Iterable[str] = ("ant", "bee"),
        val: Iterable[str] | None = None,
        count: int = 8,
        side: int = 48,
    ) -> Path:
        rng = random.Random(0)
        root = tmp_path_factory.mktemp("tree")
        for split, names in (("train", tuple(train)), ("val", tuple(train if val is None else val))):
            for k, name in enumerate(names):
                photograph = photographs[k % len(photographs)]
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    height = rng.randint(side, 2 * side)
                    width = rng.randint(side, 2 * side)
                    y = rng.randrange(photograph.shape[0] - height)
                    x = rng.randrange(photograph.shape[1] - width)
                    crop = Image.fromarray(np.ascontiguousarray(photograph[y : y + height, x : x + width]))
                    crop.save(folder / f"{i}{('.jpg', '.png')[i % 2]}")
        return root

    return write


@pytest.fixture
def tiny_flags() -> list[str]:
    """Return flags of one epoch of a tiny DHVT on digits, on the CPU; add to them, a later flag wins."""
    return TINY.split()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of `tiny_flags`, with checkpoint.pth; leave it as it is."""
    folder = tmp_path_factory.mktemp("tiny_run")
    assert main.main([*TINY.split(), "--output_dir", os.fspath(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def quick_flags(tree) -> list[str]:
    """Return flags of two epochs of 18 updates, of less than a second each, on 48 crops of photographs in two classes.

    Drop path, mixup, cutmix, RandAugment, random erasing and repeated augmentation are on.
    """
    root = os.fspath(tree(count=24, side=32))
    flags = "--data-set FOLDER --batch-size 8 --epochs 2 --warmup-epochs 0 --data-path"
    return [*SMALL.split(), *flags.split(), root]


@pytest.fixture(scope="session")
def quick_run(quick_flags, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of one epoch of `quick_flags`; leave it as it is."""
    folder = tmp_path_factory.mktemp("quick_run")
    assert main.main([*quick_flags, "--epochs", "1", "--output_dir", os.fspath(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def runner() -> Iterator[Runner]:
    """Return a function that runs main.py in forked processes, see crash_runner.py."""
    with Runner() as runner:
        yield runner


@contextmanager
def terminated_at(count: int) -> Iterator[None]:
    """Send SIGTERM to this process after that many updates within this context."""
    updates = itertools.count(1)
    hook = register_optimizer_step_post_hook(
        lambda *_: os.kill(os.getpid(), signal.SIGTERM) if next(updates) == count else None
    )
    try:
        yield
    finally:
        hook.remove()


def read_events(folder: Path) -> Iterator[Event]:
    """Yield what is in TensorBoard's files, oldest first."""
    for path in sorted((folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def read_scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """Read a curve of TensorBoard's files: step and value."""
    found = ((event.step, value) for event in read_events(folder) for value in event.summary.value)
    return sorted((step, value.simple_value) for step, value in found if value.tag == name)
