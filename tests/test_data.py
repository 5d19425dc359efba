"""Data sets, transforms, orders and shares, each against something independent of datasets.py."""

import json
import random
import shutil
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data.auto_augment import AugmentOp
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import datasets
from datasets import ClassFolders, Digits, EpochSampler, Seeded
from util import distributed, options
from util.errors import InputError
from util.transforms import to_device

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GOLDEN = json.loads((Path(__file__).parent / "golden" / "deit_helpers.json").read_text())["repeated_aug"]
PLAIN = ("--aa", "none", "--reprob", "0", "--color-jitter", "0")


def parse(*flags: str):
    return options.parse(["--data-set", "DIGITS", "--device", "cpu", "--num_workers", "0", *flags])


def normalise(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def seen(sample) -> torch.Tensor:
    """Give the images of a sample's or batch's first part as the model sees them, normalised and erased."""
    alone = isinstance(sample, torch.Tensor) and sample.ndim == 3 or sample[0].ndim == 3
    if alone:
        sample = sample[None] if isinstance(sample, torch.Tensor) else [part[None] for part in sample]
    images = to_device(sample, torch.device("cpu"))
    return images[0] if alone else images


def names(transform: transforms.Compose) -> list[str]:
    return [type(t).__name__ for t in transform.transforms]


# digits


def test_digits_are_split_as_specified() -> None:
    raw = load_digits()
    kept, held = train_test_split(np.arange(1797), test_size=360, stratify=raw.target, random_state=0)
    train, test = Digits(True, (8, 8)), Digits(False, (8, 8))
    assert (len(train), len(test)) == (1437, 360)
    assert train.targets == raw.target[kept].tolist() and test.targets == raw.target[held].tolist()
    assert train.classes == test.classes == list("0123456789")
    for digit in range(10):
        assert abs(test.targets.count(digit) - 360 * (raw.target == digit).mean()) < 1

    def fingerprints(images, targets) -> Counter:
        return Counter(
            (np.asarray(image).tobytes(), int(target)) for image, target in zip(images, targets, strict=True)
        )

    grey = [np.rint(v * 255 / 16).astype(np.uint8) for v in raw.images]
    everything = fingerprints((np.stack([g, g, g], axis=2) for g in grey), raw.target)
    assert fingerprints(train.images, train.targets) + fingerprints(test.images, test.targets) == everything


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (8, 8)])
def test_digits_are_rgb_enlarged_bicubically_to_height_and_width(size: tuple[int, int]) -> None:
    small, large = Digits(False, (8, 8)), Digits(False, size)
    for index in (0, 7, 359):
        image, target = large[index]
        assert image.mode == "RGB" and (image.height, image.width) == size and target == small.targets[index]
        expected = TF.resize(small.images[index].convert("L"), list(size), InterpolationMode.BICUBIC)
        assert (np.asarray(image) == np.asarray(expected)[:, :, None]).all()


def test_a_digit_is_shifted_by_up_to_four_pixels_and_never_flipped() -> None:
    args = parse(*PLAIN)
    originals, shown = Digits(True, (32, 32)), datasets.build_train_dataset(args, (32, 32))
    index = originals.targets.index(7)
    padded = TF.pad(originals.images[index], 4)
    crops = {
        normalise(TF.crop(padded, y, x, 32, 32)).numpy().round(4).tobytes(): (y, x) for y in range(9) for x in range(9)
    }
    found = [crops.get(seen(shown[index][0]).numpy().round(4).tobytes()) for _ in range(300)]
    assert None not in found
    assert len(set(found)) > 60  # of 81 places


# transforms


def test_small_images_are_cropped_where_larger_ones_are_cropped_and_resized() -> None:
    rest = ["RandAugment", "MaybeToTensor", "Normalize", "RandomErasing"]
    timm = parse("--transform", "timm")
    digits = datasets.build_train_dataset(timm, (32, 32)).transform
    assert names(digits) == ["RandomCrop", *rest]
    assert digits.transforms[0].size == (32, 32) and digits.transforms[0].padding == 4
    large = ["RandomResizedCropAndInterpolation", *rest]
    assert names(datasets.build_train_dataset(timm, (64, 64)).transform) == large


def test_folders_are_cropped_and_resized_and_flipped_at_32_pixels_too(tree) -> None:
    args = parse("--data-set", "FOLDER", "--data-path", str(tree(count=1)), "--aa", "none", "--reprob", "0")
    args.transform = "timm"
    found = names(datasets.build_train_dataset(args, (32, 32)).transform)
    assert found == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "ColorJitter",
        "MaybeToTensor",
        "Normalize",
    ]


def test_the_random_resized_crop_is_replaced_by_type_wherever_it_stands(monkeypatch) -> None:
    first, last = transforms.Grayscale(3), transforms.ToTensor()
    chain = [first, transforms.RandomResizedCrop(32), last]
    monkeypatch.setattr(datasets, "create_transform", lambda *args, **kwargs: transforms.Compose(chain))
    found = datasets.build_transform(True, (32, 32), small=True).transforms
    assert found[0] is first and found[2] is last
    assert isinstance(found[1], transforms.RandomCrop)


@pytest.mark.parametrize("size", [(32, 32), (24, 32), (8, 8)])
def test_small_images_are_evaluated_as_they_are(size: tuple[int, int]) -> None:
    test = datasets.build_val_dataset(parse(), size, None)
    torch.testing.assert_close(seen(test[3][0]), normalise(test.images[3]))


@pytest.mark.parametrize("side, ratio, resized", [(32, 0.875, 36), (224, 0.875, 256), (50, 0.9, 55), (40, 1.0, 40)])
def test_evaluation_resizes_bicubically_and_crops_the_centre(tree, side: int, ratio: float, resized: int) -> None:
    root = tree(count=2)
    args = parse("--data-set", "FOLDER", "--data-path", str(root), "--eval-crop-ratio", str(ratio))
    test = datasets.build_val_dataset(args, (side, side), None)
    reference = transforms.Compose(
        [
            transforms.Resize(resized, InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    assert len(test) == 4
    for i, path in enumerate(sorted((root / "val").rglob("*.*"))):
        torch.testing.assert_close(seen(test[i][0]), reference(Image.open(path).convert("RGB")), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (50, 100), (300, 200)])
def test_evaluation_at_height_and_width_covers_both_in_proportion(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image, height, width = Image.fromarray(pixels), 28, 56
    scale = max(32 / shape[0], 64 / shape[1])  # 28 and 56 pixels / 0.875: the image just covers 32 x 64
    whole = image.resize((round(shape[1] * scale), round(shape[0] * scale)), Image.Resampling.BICUBIC)
    top, left = round((whole.height - height) / 2), round((whole.width - width) / 2)
    expected = normalise(whole.crop((left, top, left + width, top + height)))
    torch.testing.assert_close(datasets.build_transform(False, (height, width))(image), expected)


def test_no_policy_is_applied_for_none_and_a_wrong_one_is_named() -> None:
    for aa in ("none", "None", ""):
        assert "RandAugment" not in names(datasets.build_transform(True, (32, 32), aa=aa))
    assert "AugMixAugment" in names(datasets.build_transform(True, (32, 32), aa="augmix-m5-w4-d2"))
    with pytest.raises(InputError, match="rand-q5"):
        datasets.build_transform(True, (32, 32), aa="rand-q5")


def test_posterising_to_no_bits_gives_black_rather_than_an_error() -> None:
    image = Digits(False, (32, 32)).images[0]
    posterised = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)(image)
    assert np.asarray(image).any() and not np.asarray(posterised).any()


def test_randaugment_at_high_magnitude_takes_every_image(tree) -> None:
    root = str(tree(count=3))
    args = parse("--data-set", "FOLDER", "--data-path", root, "--aa", "rand-m10-n4-inc1")
    train = Seeded(datasets.build_train_dataset(args, (32, 32)), 0)
    for position in range(120):
        assert seen(train[position % 6, 0, position][0]).isfinite().all()


# order and chance


def test_a_sample_depends_on_seed_epoch_and_position_alone() -> None:
    train = datasets.build_train_dataset(parse(), (32, 32))
    keys = [(5, 0, 0), (5, 0, 1), (5, 1, 0), (5, 1, 1)]
    images = [seen(Seeded(train, seed)[key][0]) for seed in (0, 1) for key in keys]
    for i, image in enumerate(images):
        assert all(not torch.equal(image, other) for other in images[:i])
    torch.rand(1), random.random(), np.random.rand()
    for image, (seed, key) in zip(images, [(s, k) for s in (0, 1) for k in keys], strict=True):
        assert torch.equal(image, seen(Seeded(train, seed)[key][0]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # two workers on one core
def test_any_number_of_workers_gives_the_same_batches() -> None:
    def read(workers: int) -> list[list[torch.Tensor]]:
        args = parse("--batch-size", "20", "--num_workers", str(workers), "--seed", "3")
        loader = datasets.build_train_loader(args, datasets.build_train_dataset(args, (16, 16)))
        batches = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            batches += islice(loader, 3)
        return batches

    alone = read(0)
    assert len({seen(batch[0]).sum().item() for batch in alone}) == len(alone)
    for workers in (1, 2):
        for found, expected in zip(read(workers), alone, strict=True):
            assert torch.equal(seen(found[0]), seen(expected[0])) and torch.equal(found[1], expected[1])


def test_loading_leaves_the_main_random_streams_alone() -> None:
    def streams():
        python, numpy, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()
        return python, numpy[1].tobytes(), numpy[2:], torch_.numpy().tobytes()

    args = parse("--batch-size", "16")
    train = datasets.build_train_loader(args, datasets.build_train_dataset(args, (16, 16)))
    test = datasets.build_val_loader(args, datasets.build_val_dataset(args, (16, 16), None))
    before = streams()
    for loader in (train, test):
        assert len(list(islice(loader, 2))) == 2
    assert streams() == before


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['n']}-{c['replicas']}")
def test_repeated_augmentation_follows_the_golden_lists(case: dict) -> None:
    world = case["replicas"]
    for rank, expected in enumerate(case["ranks"]):
        sampler = EpochSampler(case["n"], True, 0, rank, world)
        sampler.set_epoch(case["epoch"])
        keys = list(sampler)
        assert [index for index, _, _ in keys] == expected and len(sampler) == len(expected)
        assert [epoch for _, epoch, _ in keys] == [case["epoch"]] * len(expected)
        assert [position for _, _, position in keys] == [rank + i * world for i in range(len(expected))]


@pytest.mark.parametrize("repeated", [True, False])
def test_seed_and_epoch_change_the_order(repeated: bool) -> None:
    def order(seed: int, epoch: int | None) -> list[int]:
        sampler = EpochSampler(600, repeated, seed, 0, 1)
        if epoch is not None:
            sampler.set_epoch(epoch)
        return [index for index, _, _ in sampler]

    assert order(0, 0) == order(0, None) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(0, 2)
    assert order(0, 0) != order(1, 0)
    assert order(4, 3) == order(0, 7)  # the permutation comes from the sum alone


@pytest.mark.parametrize("n, world", [(1, 1), (100, 1), (255, 1), (100, 3), (254, 4)])
def test_below_256_images_repeated_augmentation_takes_all(n: int, world: int) -> None:
    ranks = [[index for index, _, _ in EpochSampler(n, True, 0, rank, world)] for rank in range(world)]
    assert {len(indices) for indices in ranks} == {-(-3 * n // world)}
    shown = Counter(index for indices in ranks for index in indices)
    assert set(shown) == set(range(n)) and min(shown.values()) == 3
    assert sum(shown.values()) - 3 * n < world  # the padding


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize(
    "n, batch, world", [(1437, 128, 1), (1437, 100, 2), (513, 16, 3), (100, 8, 1), (100, 8, 3), (7, 3, 2), (3, 1, 5)]
)
def test_the_number_of_distinct_images_is_counted_right(n: int, batch: int, world: int, repeated: bool) -> None:
    shown = set()
    for rank in range(world):
        sampler = EpochSampler(n, repeated, 0, rank, world)
        for keys in torch.utils.data.BatchSampler(sampler, batch, drop_last=True):
            shown |= {index for index, _, _ in keys}
    assert EpochSampler(n, repeated, 0, 0, world).distinct_images(n, batch) == len(shown)


def test_without_repetition_the_ranks_share_the_images_out() -> None:
    indices = [index for rank in range(3) for index, _, _ in EpochSampler(300, False, 5, rank, 3)]
    assert sorted(indices) == list(range(300))


@pytest.mark.parametrize("flags, per_process", [(("--no-repeated-aug",), 1437), ((), 1280)])
def test_training_takes_whole_batches(flags: tuple[str, ...], per_process: int) -> None:
    args = parse("--batch-size", "96", *flags)
    loader = datasets.build_train_loader(args, datasets.build_train_dataset(args, (8, 8)))
    assert len(loader) == per_process // 96
    assert len(seen(next(iter(loader))[0])) == 96


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 3, 4, 360])
def test_validation_shares_part_the_set(monkeypatch, n: int, world: int) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        loader = datasets.build_val_loader(parse("--batch-size", "10"), range(n))
        batches = [batch.tolist() for batch in loader]
        assert all(len(batch) == 15 for batch in batches[:-1])
        shares.append([index for batch in batches for index in batch])
    assert sorted(index for share in shares for index in share) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("cores, processes, share", [(16, 1, 10), (16, 4, 4), (2, 3, 1), (7, 2, 3)])
def test_workers_default_to_the_share_of_the_cores(monkeypatch, cores: int, processes: int, share: int) -> None:
    monkeypatch.setattr(datasets.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(distributed, "local_world_size", lambda: processes)
    assert datasets.default_workers() == share


# class folders


def targets_by_folder(dataset: ClassFolders) -> dict[str, int]:
    return {Path(path).parent.name: target for path, target in dataset.samples}


def open_val(root: Path, classes: list[str] | None = None) -> ClassFolders:
    return datasets.build_val_dataset(parse("--data-set", "FOLDER", "--data-path", str(root)), (32, 32), classes)


def test_a_class_that_only_training_has_keeps_the_indices_of_the_others(tree) -> None:
    test = open_val(tree(("ant", "bee", "cat"), ("ant", "cat"), count=1))
    assert targets_by_folder(test) == {"ant": 0, "cat": 2}
    assert test.classes == ["ant", "bee", "cat"]


def test_without_training_images_the_checkpoint_numbers_the_classes(tree) -> None:
    root = tree(("ant",), ("ant", "cat"), count=1)
    shutil.rmtree(root / "train")
    assert targets_by_folder(open_val(root)) == {"ant": 0, "cat": 1}
    test = open_val(root, ["cat", "ant", "bee"])
    assert targets_by_folder(test) == {"cat": 0, "ant": 1}
    assert test.classes == ["cat", "ant", "bee"]
    with pytest.raises(InputError, match="cat"):
        open_val(root, ["ant", "bee"])


def test_training_images_outrank_the_checkpoint_in_numbering_classes(tree) -> None:
    assert open_val(tree(count=1), ["bee", "ant"]).classes == ["ant", "bee"]


def test_an_empty_class_folder_is_named_wherever_it_is(tree) -> None:
    for split in ("train", "val"):
        root = tree(count=1)
        for path in (root / split / "bee").iterdir():
            path.rename(path.with_suffix(".txt"))
        with pytest.raises(InputError, match=f"{split}/bee"):
            datasets.build_dataset("FOLDER", str(root), split == "train", (32, 32), None)


FORMS = {
    "grey.png": lambda rgb: rgb.convert("L"),
    "grey_alpha.png": lambda rgb: rgb.convert("LA"),
    "palette.png": lambda rgb: rgb.quantize(4),
    "rgba.png": lambda rgb: rgb.convert("RGBA"),
    "cmyk.jpg": lambda rgb: rgb.convert("CMYK"),
}


@pytest.mark.parametrize("name", FORMS)
def test_images_of_every_form_load_as_rgb_without_a_warning(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    rgb = Image.new("RGB", (32, 16), (200, 30, 90))
    rgb.paste((40, 160, 220), (16, 0, 32, 16))
    image = FORMS[name](rgb)
    image.save(folder / name, **({"transparency": b"\x80\x40"} if image.mode == "P" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, target = ClassFolders(tmp_path / "val")[0]
    assert (loaded.mode, loaded.size, target) == ("RGB", (32, 16), 0)
    expected = np.asarray(rgb).astype(int)
    if image.mode in ("L", "LA"):
        expected = np.rint(expected @ (0.299, 0.587, 0.114))[:, :, None]
    assert np.abs(np.asarray(loaded).astype(int) - expected).max() <= 3
