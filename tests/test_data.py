"""Digits, class folders, orders, shares and loaders, each against something independent of the product."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import BatchSampler, DataLoader, default_collate
from torchvision.transforms import InterpolationMode

import datasets
from data.images import ImageFiles, find_images
from data.sampler import EpochSampler, SeededDataset
from util import distributed
from util.config import AugmentConfig, DataConfig, ModelConfig
from util.errors import InputError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "deit_helpers.json").read_text())["repeated_aug"]
DIGITS = DataConfig("DIGITS", num_workers=0)
CONFIG = ModelConfig("", input_size=(32, 32))


def build_train_loader(data: DataConfig, batch_size: int, repeated_aug: bool = True) -> DataLoader:
    dataset = datasets.build_train_set(data, CONFIG, AugmentConfig())
    return datasets.build_train_loader(dataset, data, batch_size=batch_size, repeated_aug=repeated_aug, seed=3)


def build_val_loader(data: DataConfig) -> DataLoader:
    return datasets.build_val_loader(datasets.build_val_set(data, CONFIG), data, batch_size=4)


# digits


def test_digits_are_split_as_specified():
    raw = load_digits()
    grey = np.rint(raw.images * 255 / 16).astype(np.uint8)
    splits = train_test_split(np.arange(1797), test_size=360, stratify=raw.target, random_state=0)
    for train, indices in zip((True, False), splits, strict=True):
        digits = datasets.load_digits(train, (8, 8), None)
        assert len(digits) == (1437 if train else 360)
        assert digits.classes == list("0123456789")
        assert digits.targets == raw.target[indices].tolist()
        np.testing.assert_array_equal(digits.data, grey[indices, :, :, None].repeat(3, axis=3))


def test_digits_are_rgb_enlarged_bicubically_to_height_and_width():
    small = datasets.load_digits(False, (8, 8), None)
    large = datasets.load_digits(False, (24, 40), None)
    image, target = large[359]
    assert image.mode == "RGB" and (image.height, image.width) == (24, 40) and target == small.targets[359]
    expected = TF.resize(Image.fromarray(small.data[359]).convert("L"), [24, 40], InterpolationMode.BICUBIC)
    assert (np.asarray(image) == np.asarray(expected)[:, :, None]).all()


def test_a_digit_is_shifted_by_up_to_four_pixels_never_flipped_and_evaluated_as_it_is():
    train = datasets.build_train_set(DIGITS, CONFIG, AugmentConfig(aa="none", color_jitter=0.0))
    seven = train.targets.index(7)
    padded = np.pad(train.data[seven], ((4, 4), (4, 4), (0, 0)))
    places = {padded[y : y + 32, x : x + 32].tobytes() for y in range(9) for x in range(9)}
    shown = {train[seven][0].permute(1, 2, 0).numpy().tobytes() for _ in range(300)}
    assert shown <= places and len(shown) > 60  # of 81

    val = datasets.build_val_set(DIGITS, CONFIG)
    assert (val[3][0].permute(1, 2, 0).numpy() == val.data[3]).all()


# class folders


def folder(root: Path) -> DataConfig:
    return DataConfig("FOLDER", str(root), num_workers=0)


def val_numbers(root: Path, classes: list[str] | None = None) -> tuple[list[str], dict[str, int]]:
    """Return the classes of the validation set, and the target of each of its folders."""
    val = datasets.build_val_set(folder(root), CONFIG, classes)
    return val.classes, {Path(path).parent.name: target for path, target in zip(val.files, val.targets, strict=True)}


def test_the_training_set_numbers_the_classes_and_the_checkpoint_does_without_it(tree, capsys):
    root = tree(("ant", "bee", "cat"), ("ant", "cat"), count=1)
    for classes in (None, ["cat", "bee", "ant"]):
        assert val_numbers(root, classes) == (["ant", "bee", "cat"], {"ant": 0, "cat": 2})
        assert "lacks 1 of the 3 classes: bee" in capsys.readouterr().out
    shutil.rmtree(root / "train")
    assert val_numbers(root) == (["ant", "cat"], {"ant": 0, "cat": 1})
    assert val_numbers(root, ["cat", "ant", "bee"]) == (["cat", "ant", "bee"], {"cat": 0, "ant": 1})
    with pytest.raises(InputError, match=r"val/cat: .*ant, bee"):
        val_numbers(root, ["ant", "bee"])


def test_hidden_folders_are_no_classes(tree):
    root = tree(("ant", "bee"), count=1)
    for split in ("train", "val"):
        shutil.copytree(root / split / "ant", root / split / ".ipynb_checkpoints")
    assert val_numbers(root) == (["ant", "bee"], {"ant": 0, "bee": 1})


def test_images_are_found_behind_links_as_in_training(tree, tmp_path):
    root = tree(count=1)
    (tmp_path / "linked").symlink_to(root / "train")
    assert find_images(tmp_path) == [str(tmp_path / "linked" / name / "0.jpg") for name in ("ant", "bee")]


def test_a_type_error_of_pillow_names_the_image(tree, monkeypatch):
    """Some damaged TIFFs are TypeErrors."""
    root = tree(count=1)
    val = datasets.build_val_set(DataConfig("FOLDER", str(root), transform="timm"), CONFIG)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: [] + 1)
    with pytest.raises(InputError, match=f"^{root}/val/ant/0.jpg: not a readable image"):
        val[0]


def test_ignored_files_are_counted_in_a_line(tree, capsys):
    root = tree(count=1) / "val"
    for name in ("ant/a.gif", "ant/b.GIF", "bee/notes.txt", "bee/Thumbs"):
        (root / name).write_text("")
    val = datasets.build_val_set(folder(root.parent), CONFIG)
    assert [Path(path).name for path in val.files] == ["0.jpg", "0.jpg"]
    assert f"{root}: 4 files are ignored (2 .gif, 1 Thumbs, 1 .txt)" in capsys.readouterr().out


@pytest.mark.parametrize("transform", ["fast", "timm"])
def test_a_damaged_or_missing_image_is_named_with_either_transform(tree, transform):
    root = tree(count=2)
    val = datasets.build_val_set(DataConfig("FOLDER", str(root), transform=transform), CONFIG)
    path = root / "val" / "ant" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=f"^{path}: not a readable image .*truncated"):
        val[0]
    path.unlink()
    with pytest.raises(InputError, match=f"^{path}: no such file"):
        val[0]


def test_pictures_are_normalized_images_from_all_parts_of_the_set(tree):
    root = tree(count=4)
    val = datasets.build_val_set(DataConfig("FOLDER", str(root), transform="timm"), CONFIG)
    shown = list(datasets.evenly_spaced(val, 4))
    assert [f"{label}/{name}" for _, label, name in shown] == ["ant/0.jpg", "ant/2.jpg", "bee/0.jpg", "bee/2.jpg"]
    assert torch.equal(shown[3][0], val[6][0])
    unlabelled = datasets.build_image_set(root, CONFIG)
    assert isinstance(unlabelled, ImageFiles) and len(unlabelled) == 16
    assert len(list(datasets.evenly_spaced(unlabelled, 16))) == 16
    assert next(datasets.evenly_spaced(unlabelled, 1))[1] is None


# order and chance


def streams() -> tuple:
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2:], torch.get_rng_state().numpy().tobytes()


def test_a_sample_depends_on_seed_epoch_and_position_alone():
    train = datasets.build_train_set(DIGITS, CONFIG, AugmentConfig())
    keys = [(seed, (5, epoch, position)) for seed in (0, 1) for epoch in (0, 1) for position in (0, 1)]
    images = [SeededDataset(train, seed).__getitems__([key])[0][0] for seed, key in keys]
    assert len({image.numpy().tobytes() for image in images}) == len(keys)
    for image, (seed, key) in zip(images, keys, strict=True):
        random.random()
        np.random.rand()
        torch.rand(1)
        assert torch.equal(image, SeededDataset(train, seed).__getitems__([key])[0][0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # two workers on one core
def test_any_number_of_workers_gives_the_same_batches(tree):
    root = str(tree(count=4))

    def read(workers: int) -> list:
        data = DataConfig("FOLDER", root, num_workers=workers)
        train = build_train_loader(data, 4)
        batches = []
        for epoch in (0, 1):
            train.sampler.set_epoch(epoch)
            batches += train
        return [*batches, *build_val_loader(data)]

    alone = read(0)
    assert len(alone) == 2 * 6 + 2 and alone[0][0].dtype == torch.uint8
    assert len({images.numpy().tobytes() for images, _ in alone}) == len(alone)
    torch.testing.assert_close(read(2), alone, rtol=0, atol=0)


def test_loading_leaves_the_main_random_streams_alone(tree):
    data = folder(tree(count=2))
    train = build_train_loader(data, 4)
    val = build_val_loader(data)
    keys = [(3, 1, 0), (0, 1, 1), (3, 1, 2)]
    before = streams()
    next(iter(train)), next(iter(val))
    together = default_collate(train.dataset.__getitems__(keys))
    alone = default_collate([sample for key in keys for sample in train.dataset.__getitems__([key])])
    Path(train.dataset.dataset.files[3]).write_bytes(b"")
    with pytest.raises(InputError, match="not a readable image"):
        train.dataset.__getitems__([(3, 0, 0)])
    assert streams() == before
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


def order(n: int, repeated: bool, seed: int = 0, rank: int = 0, world: int = 1, epoch: int = 0) -> list[int]:
    sampler = EpochSampler(n, repeated, seed, rank, world)
    sampler.set_epoch(epoch)
    return [index for index, _, _ in sampler]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['n']}-{c['replicas']}")
def test_repeated_augmentation_follows_the_golden_lists(case):
    world = case["replicas"]
    for rank, expected in enumerate(case["ranks"]):
        sampler = EpochSampler(case["n"], True, 0, rank, world)
        sampler.set_epoch(case["epoch"])
        keys = [(index, case["epoch"], rank + i * world) for i, index in enumerate(expected)]
        assert list(sampler) == keys and len(sampler) == len(keys)
        # an epoch that was stopped goes on with the same keys
        sampler.set_epoch(case["epoch"], start=5)
        assert list(sampler) == keys[5:] and len(sampler) == len(keys)


@pytest.mark.parametrize("repeated", [True, False])
def test_seed_and_epoch_change_the_order(repeated):
    first = order(600, repeated)
    assert first == order(600, repeated)
    assert first != order(600, repeated, epoch=1) != order(600, repeated, epoch=2)
    assert first != order(600, repeated, seed=1)
    # the permutation comes from the sum alone
    assert order(600, repeated, seed=4, epoch=3) == order(600, repeated, epoch=7)


@pytest.mark.parametrize(("n", "world"), [(1, 1), (255, 1), (254, 4)])
def test_below_256_images_repeated_augmentation_takes_all(n, world):
    ranks = [order(n, True, rank=rank, world=world) for rank in range(world)]
    assert {len(indices) for indices in ranks} == {-(-3 * n // world)}
    shown = Counter(index for indices in ranks for index in indices)
    assert set(shown) == set(range(n)) and min(shown.values()) == 3
    assert shown.total() - 3 * n < world  # the padding


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize(("n", "batch", "world"), [(1437, 100, 2), (513, 16, 3), (7, 3, 2), (3, 1, 5)])
def test_the_ranks_share_the_images_out_and_distinct_ones_are_counted_right(n, batch, world, repeated):
    shown = set()
    orders = [order(n, repeated, rank=rank, world=world) for rank in range(world)]
    for indices in orders:
        shown.update(*BatchSampler(indices, batch, drop_last=True))
    assert EpochSampler(n, repeated, 0, 0, world).distinct_images(batch) == len(shown)
    if not repeated:
        counts = Counter(sum(orders, []))
        assert set(counts) == set(range(n)) and counts.total() - n < world


@pytest.mark.parametrize(("repeated", "per_process"), [(False, 1437), (True, 1280)])
def test_training_takes_whole_batches(repeated, per_process):
    loader = build_train_loader(DIGITS, 96, repeated)
    assert len(loader) == per_process // 96
    assert len(next(iter(loader))[0]) == 96


def test_a_batch_may_be_all_images(tree):
    data = DataConfig("FOLDER", root=str(tree(count=4)), num_workers=0)
    images = len(datasets.build_train_set(data, CONFIG, AugmentConfig()))
    assert len(build_train_loader(data, images, repeated_aug=False)) == 1
    with pytest.raises(InputError, match=f"--batch-size {images + 1}"):
        build_train_loader(data, images + 1, repeated_aug=False)


@pytest.mark.parametrize(("side", "steps"), [(32, ["RandomCrop"]), (33, ["RandomResizedCropAndInterpolation"])])
def test_digits_are_drawn_at_up_to_32_pixels(side, steps):
    """Larger inputs are crops."""
    config = ModelConfig("", input_size=(side, side))
    transform = datasets.build_train_set(DIGITS, config, AugmentConfig(aa="none")).transform
    found = [type(step).__name__ for step in transform.reference.transforms]
    assert [name for name in found if "Crop" in name] == steps


@pytest.mark.parametrize("world", [1, 3, 5])
def test_validation_shares_part_the_set(monkeypatch, world):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    for n in (1, 4, 360):
        shares = []
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            loader = datasets.build_val_loader(range(n), DIGITS, batch_size=10)
            shares.append([index for batch in loader for index in batch.tolist()])
        assert sorted(sum(shares, [])) == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("cores", "available", "processes", "torchrun", "share"),
    [
        (16, 16, 1, False, 10),
        (16, 16, 4, False, 4),
        (2, 2, 3, True, 1),
        # bound to some of the cores: by Slurm each process on its own, below torchrun all together
        (16, 4, 4, False, 4),
        (16, 4, 2, True, 2),
    ],
)
def test_workers_default_to_the_share_of_the_cores(monkeypatch, cores, available, processes, torchrun, share):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(available)), raising=False)
    monkeypatch.setattr(distributed, "local_world_size", lambda: processes)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if torchrun:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert datasets.default_workers() == share
