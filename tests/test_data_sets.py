"""CIFAR, iNaturalist and 3-Augment, on small files of the real formats and by pixels computed here."""

import hashlib
import json
import pickle
import random
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from torchvision import transforms

import datasets
import main
from util import cifar, distributed, inat, options
from util.errors import InputError
from util.sampling import Seeded

MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
NAMES = {"CIFAR": [f"fine {i}" for i in range(100)], "CIFAR-10": [f"thing {i}" for i in range(10)]}


def parse(*flags: str):
    return options.parse(["--device", "cpu", "--num_workers", "0", *flags])


def names(transform: transforms.Compose) -> list[str]:
    return [type(t).__name__ for t in transform.transforms]


def restore(image: torch.Tensor) -> np.ndarray:
    """Turn a normalised [3, H, W] back into uint8 [H, W, 3]; without the boxes to erase that a sample may have."""
    image = image if isinstance(image, torch.Tensor) else image[0]
    if image.dtype == torch.uint8:
        return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return np.rint((image.numpy().transpose(1, 2, 0) * STD + MEAN) * 255).astype(np.uint8)


# CIFAR


def write_batch(folder: Path, file: str, content: dict) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]


@pytest.fixture
def write_cifar(monkeypatch) -> Callable:
    """Give a function that writes a small CIFAR and has torchvision take its checksums.

    It returns (train, test), each uint8 images [N, 32, 32, 3] and labels.
    """

    def write(name: str, root: Path) -> tuple[tuple[np.ndarray, list[int]], tuple[np.ndarray, list[int]]]:
        rng, kind = np.random.default_rng(0), cifar.KINDS[name]
        folder, count = root / kind.base_folder, len(NAMES[name])

        def batch(n: int) -> tuple[np.ndarray, list[int]]:
            return rng.integers(0, 256, (n, 3072), dtype=np.uint8), rng.integers(0, count, n).tolist()

        train, test = [batch(8) for _ in range(1 if name == "CIFAR" else 5)], batch(12)
        if name == "CIFAR":
            files = [("train", train[0]), ("test", test)]
            meta = {"fine_label_names": NAMES[name], "coarse_label_names": ["coarse"] * 20}
            label_key = "fine_labels"
        else:
            files = [*((f"data_batch_{i}", b) for i, b in enumerate(train, 1)), ("test_batch", test)]
            meta, label_key = {"label_names": NAMES[name], "num_vis": 3072}, "labels"
        sums = [
            write_batch(folder, file, {"data": data, label_key: labels, "coarse_labels": [0] * len(labels)})
            for file, (data, labels) in files
        ]
        monkeypatch.setattr(kind, "train_list", sums[:-1])
        monkeypatch.setattr(kind, "test_list", sums[-1:])
        md5 = write_batch(folder, kind.meta["filename"], meta)[1]
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5})
        pixels, labels = np.concatenate([b[0] for b in train]), sum((b[1] for b in train), [])
        planes = [p.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for p in (pixels, test[0])]
        return (planes[0], labels), (planes[1], test[1])

    return write


@pytest.mark.parametrize("name", cifar.KINDS)
def test_cifar_is_one_array_of_the_files_pixels_and_labels(write_cifar, tmp_path: Path, name: str) -> None:
    written = write_cifar(name, tmp_path)
    for train, (pixels, labels) in zip((True, False), written, strict=True):
        found = datasets.build_dataset(name, str(tmp_path), train, (32, 32), None)
        assert isinstance(found.data, np.ndarray) and found.data.dtype == np.uint8
        np.testing.assert_array_equal(found.data, pixels)
        assert found.targets == labels and list(found.classes) == NAMES[name] and len(found) == len(labels)
        image, target = found[5]
        assert (np.asarray(image) == pixels[5]).all() and target == labels[5]


@pytest.mark.parametrize("name", cifar.KINDS)
def test_cifar_trains_and_evaluates(write_cifar, tiny_flags, tmp_path: Path, name: str, capsys) -> None:
    write_cifar(name, tmp_path / "data")
    flags = [*tiny_flags, "--data-set", name, "--data-path", str(tmp_path / "data"), "--batch-size", "8"]
    assert main.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    saved = torch.load(tmp_path / "out" / "checkpoint.pth")
    assert saved["classes"] == NAMES[name] and len(saved["model"]["head.weight"]) == len(NAMES[name])
    log = json.loads((tmp_path / "out" / "log.txt").read_text())
    capsys.readouterr()
    assert main.main([*flags, "--eval", "--resume", str(tmp_path / "out" / "checkpoint.pth")]) == 0
    out = capsys.readouterr().out
    assert "on the 12 test images" in out
    assert float(re.search(r"Acc@1 ([\d.]+)", out)[1]) == pytest.approx(log["test_acc1"], abs=1e-3)


def test_cifar_at_32_pixels_is_shifted_flipped_and_evaluated_as_it_is(write_cifar, tmp_path: Path) -> None:
    train, test = write_cifar("CIFAR-10", tmp_path)
    flags = ["--data-set", "CIFAR-10", "--data-path", str(tmp_path), "--aa", "none", "--reprob", "0"]
    args = parse(*flags, "--color-jitter", "0")
    shown = Seeded(datasets.build_train_dataset(args, (32, 32)), 0)
    padded = np.pad(train[0][3], ((4, 4), (4, 4), (0, 0)))
    crops = {(y, x, 1): padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)}
    crops |= {(y, x, -1): crop[:, ::-1] for (y, x, _), crop in crops.items()}
    places = {crop.tobytes(): place for place, crop in crops.items()}
    found = [places[restore(shown[3, 0, position][0]).tobytes()] for position in range(150)]
    assert len(set(found)) > 75 and 45 < [place[2] for place in found].count(-1) < 105

    evaluated = datasets.build_val_dataset(args, (32, 32), None)
    for i in (0, 11):
        assert (restore(evaluated[i][0]) == test[0][i]).all()


@pytest.mark.parametrize("size", [(48, 48), (24, 24)])
def test_cifar_at_other_sizes_is_cropped_and_resized_as_any_set(write_cifar, tmp_path: Path, size) -> None:
    test = write_cifar("CIFAR", tmp_path)[1]
    args = parse("--data-set", "CIFAR", "--data-path", str(tmp_path))
    timm = parse("--data-set", "CIFAR", "--data-path", str(tmp_path), "--transform", "timm")
    assert names(datasets.build_train_dataset(timm, (32, 32)).transform)[:3] == [
        "RandomCrop",
        "RandomHorizontalFlip",
        "RandAugment",
    ]
    train = datasets.build_train_dataset(timm, size)
    assert names(train.transform)[:2] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]
    assert train[0][0].shape == restore(datasets.build_train_dataset(args, size)[0][0]).transpose(2, 0, 1).shape
    assert train[0][0].shape == (3, *size)
    whole = Image.fromarray(test[0][2]).resize((int(size[0] / 0.875),) * 2, Image.Resampling.BICUBIC)
    expected = np.asarray(transforms.functional.center_crop(whole, size))
    assert (restore(datasets.build_val_dataset(args, size, None)[2][0]) == expected).all()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        """Say nothing."""


@pytest.fixture
def far(monkeypatch, write_cifar, tmp_path: Path) -> Iterator[Path]:
    """Give a small CIFAR-10 as an archive that torchvision would download from this machine."""
    kind, folder = cifar.KINDS["CIFAR-10"], tmp_path / "far"
    write_cifar("CIFAR-10", folder)
    archive = folder / "far.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / kind.base_folder, kind.base_folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(kind, "url", f"http://127.0.0.1:{server.server_port}/far.tar.gz")
        monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        Thread(target=server.serve_forever, daemon=True).start()
        yield archive
        server.shutdown()


def test_cifar_is_downloaded_on_first_use_and_an_archive_in_place_is_taken(far: Path, tmp_path: Path) -> None:
    root = tmp_path / "here" / "cifar"
    assert len(cifar.open_cifar("CIFAR-10", str(root), True)) == 40
    far.unlink()
    assert len(cifar.open_cifar("CIFAR-10", str(root), False)) == 12  # without another download
    for path in (root / "cifar-10-batches-py").iterdir():
        path.unlink()
    assert len(cifar.open_cifar("CIFAR-10", str(root), False)) == 12  # from the archive that was kept


def test_only_rank_0_downloads_and_the_others_learn_how_it_went(monkeypatch, far: Path, tmp_path: Path) -> None:
    root, said = str(tmp_path / "here"), []
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: said.append(value) or "rank 0's trouble")
    with pytest.raises(InputError, match="^rank 0's trouble$"):
        cifar.open_cifar("CIFAR-10", root, True)
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: "")
    with pytest.raises(InputError, match=r"here/cifar-10-python\.tar\.gz: .*not this machine.*; put http:"):
        cifar.open_cifar("CIFAR-10", root, True)
    assert not Path(root).exists()

    def finish_rank_0(value: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "is_primary", lambda: True)
            patch.setattr(distributed, "broadcast_object", lambda value: value)
            cifar.open_cifar("CIFAR-10", root, True)
        return ""

    monkeypatch.setattr(distributed, "broadcast_object", finish_rank_0)  # it returns when rank 0 is done
    assert len(cifar.open_cifar("CIFAR-10", root, True)) == 40


@pytest.mark.parametrize("spoil", ["data_batch_2", "batches.meta", "far.tar.gz", "nothing"])
def test_a_damaged_or_unreachable_cifar_says_what_to_put_where(far: Path, tmp_path: Path, spoil: str) -> None:
    kind = cifar.KINDS["CIFAR-10"]
    root = far.parent if spoil in ("data_batch_2", "batches.meta") else tmp_path / "here"
    for path in far.parent.rglob(spoil):
        path.write_bytes(path.read_bytes()[:-1])
    if spoil != "far.tar.gz":
        far.unlink()
    with pytest.raises(InputError) as error:
        cifar.open_cifar("CIFAR-10", str(root), True)
    line = str(error.value)
    assert line.startswith(f"{root / 'cifar-10-python.tar.gz'}: missing or damaged, and not downloaded (")
    assert line.endswith(f"; put {kind.url} there, and remove cifar-10-batches-py/ if there is one")
    assert "\n" not in line and "download=True" not in line
    assert spoil != "nothing" or not root.exists()


# iNaturalist

CATEGORIES = [
    {"kingdom": "Animalia", "class": "Aves", "order": "Passeriformes", "supercategory": "Birds", "name": "Parus major"},
    {"kingdom": "Animalia", "class": "Insecta", "order": "Lepidoptera", "supercategory": "Insects", "name": "Pieris"},
    {"kingdom": "Plantae", "class": "Magnoliopsida", "order": "Rosales", "supercategory": "Plants", "name": "Rosa"},
    {"kingdom": "Animalia", "class": "Aves", "order": "Strigiformes", "supercategory": "Birds", "name": "Strix aluco"},
]
ANNOTATED = {"train": [2, 0, 3, 0, 1, 2], "val": [1, 3, 0, 2]}  # categories in the order of the annotations
SHOWN = {"train": [3, 2, 2, 1, 0, 0], "val": [0, 1, 2, 3]}  # and in that of the images
EXPECTED = {  # names by first appearance in train's annotations, and the targets of SHOWN
    "name": (["Rosa", "Parus major", "Strix aluco", "Pieris"], [2, 0, 0, 3, 1, 1], [1, 3, 0, 2]),
    "supercategory": (["Plants", "Birds", "Insects"], [1, 0, 0, 2, 1, 1], [1, 2, 0, 1]),
    "order": (
        ["Rosales", "Passeriformes", "Strigiformes", "Lepidoptera"],
        [2, 0, 0, 3, 1, 1],
        [1, 3, 0, 2],
    ),
    "class": (["Magnoliopsida", "Aves", "Insecta"], [1, 0, 0, 2, 1, 1], [1, 2, 0, 1]),
    "kingdom": (["Plantae", "Animalia"], [1, 0, 0, 1, 1, 1], [1, 1, 0, 1]),
}


def colour(split: str, i: int) -> tuple[int, int, int]:
    return (20 * i, 200, 10 if split == "train" else 250)


def write_inat(root: Path, year: int = 2018, official: bool = True) -> Path:
    """Write lists and plain images of 40 x 36 pixels, image i of a split in `colour`, in either layout."""
    root.mkdir()
    (root / "categories.json").write_text(json.dumps(CATEGORIES))
    for split in ("train", "val"):
        files = []
        for i, category in enumerate(SHOWN[split]):
            group = CATEGORIES[category]["supercategory"]
            files.append(f"train_val{year}/{group}/{category}/{split}{i}.png")
            path = root / (files[-1] if official else files[-1].replace(f"{group}/", ""))
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 36), colour(split, i)).save(path)
        images = [{"id": 100 + i, "file_name": file, "width": 40} for i, file in enumerate(files)]
        annotations = [{"id": 7 * i, "image_id": 100, "category_id": c} for i, c in enumerate(ANNOTATED[split])]
        (root / f"{split}{year}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return root


@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("name, category", [*(("INAT", key) for key in EXPECTED), ("INAT19", "name")])
def test_inaturalist_is_numbered_by_first_appearance_in_training(
    tmp_path: Path, name: str, category: str, official: bool
) -> None:
    root = write_inat(tmp_path / "data", 2018 if name == "INAT" else 2019, official)
    classes, *targets = EXPECTED[category]
    for split, expected in zip(("train", "val"), targets, strict=True):
        found = datasets.build_dataset(name, str(root), split == "train", (32, 32), None, inat_category=category)
        assert found.classes == classes and found.targets == expected and len(found) == len(expected)
        for i in range(len(found)):
            image, target = found[i]
            assert (image.size, image.getpixel((5, 5)), target) == ((40, 36), colour(split, i), expected[i])


@pytest.mark.parametrize("name, year, category", [("INAT", 2018, "supercategory"), ("INAT19", 2019, "name")])
def test_inaturalist_trains_and_evaluates(
    tiny_flags, tmp_path: Path, name: str, year: int, category: str, capfd
) -> None:
    root, saved = write_inat(tmp_path / "data", year, official=year == 2018), str(tmp_path / "out" / "checkpoint.pth")
    flags = [*tiny_flags, "--data-set", name, "--data-path", str(root), "--batch-size", "2"]
    flags += ["--inat-category", category]
    assert main.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    assert torch.load(saved)["classes"] == EXPECTED[category][0]
    shown = []
    for _ in range(2):  # with the training list, and without: the checkpoint then numbers the classes
        capfd.readouterr()
        assert main.main([*flags, "--eval", "--resume", saved]) == 0
        shown.append(capfd.readouterr().out)
        (root / f"train{year}.json").unlink(missing_ok=True)
    assert shown[0] == shown[1] and "on the 4 test images" in shown[0]
    assert main.main([*flags, "--inat-category", "kingdom", "--eval", "--resume", saved]) == 2
    assert re.search(r"val20\d\d\.json: .* is of class 'Animalia', not among the \d training", capfd.readouterr().err)


def test_a_training_class_that_validation_lacks_is_said(tmp_path: Path, capsys) -> None:
    root = write_inat(tmp_path / "data")
    content = json.loads((root / "val2018.json").read_text())
    del content["images"][1]
    (root / "val2018.json").write_text(json.dumps(content))
    args = parse("--data-set", "INAT", "--data-path", str(root))
    assert datasets.build_val_dataset(args, (32, 32), None).targets == [1, 0, 2]
    assert "lacks 1 of the 4 classes: Pieris" in capsys.readouterr().out


BAD_NAMES = ("a/b/0", "a/b/0/c/d", "/a/0/c.png", "a/../0/c.png", "./a/0/c.png", "a/b/0/..", "a/b/0/..\\c", "a/b/-1/c")


@pytest.mark.parametrize("file_name", [*BAD_NAMES, "a/b/x/c.png", "a/b/٣/c.png", f"a/b/{'1' * 5000}/c.png", 3, None])
def test_a_file_name_out_of_form_or_folder_is_refused(tmp_path: Path, file_name) -> None:
    root = write_inat(tmp_path / "data")
    content = json.loads((root / "train2018.json").read_text())
    content["images"][4]["file_name"] = file_name
    (root / "train2018.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"train2018\.json: image 4 has file_name .* not of the form"):
        inat.read_split(root, "INAT", True, "name")


@pytest.mark.parametrize("category", [4, -1, True, "1", 1.0, None])
def test_a_category_that_is_no_entry_of_the_categories_is_refused(tmp_path: Path, category) -> None:
    root = write_inat(tmp_path / "data")
    content = json.loads((root / "train2018.json").read_text())
    content["annotations"][3]["category_id"] = category
    (root / "train2018.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"train2018\.json: annotation 3 is of category .*categories\.json has 4"):
        inat.read_split(root, "INAT", False, "name")


# 3-Augment


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """Give a photograph of 32 x 32 pixels."""
    return Image.fromarray(load_sample_images().images[0][100:292, 200:392]).resize((32, 32))


def three_augment(*flags: str, data_set: str = "FOLDER", size: tuple[int, int] = (32, 32), monkeypatch) -> list:
    """Give the training transforms of a command line; the data are not opened."""
    monkeypatch.setattr(datasets, "build_dataset", lambda name, root, train, size, transform, *rest: transform)
    args = parse("--data-set", data_set, "--data-path", "none", "--ThreeAugment", "--transform", "timm", *flags)
    return datasets.build_train_dataset(args, size).transforms


def test_three_augments_transforms_in_their_order(monkeypatch) -> None:
    def found(*flags: str, **kwargs) -> list[str]:
        return [type(t).__name__ for t in three_augment(*flags, monkeypatch=monkeypatch, **kwargs)]

    crop, flip, end = "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", ["MaybeToTensor", "Normalize"]
    assert found() == [crop, flip, "AutoAugment", "ColorJitter", *end]
    assert found("--aa", "none", "--reprob", "1") == found()
    assert found("--color-jitter", "0") == [crop, flip, "AutoAugment", *end]
    assert found("--src") == ["Resize", "RandomCrop", flip, "AutoAugment", "ColorJitter", *end]
    assert found("--src", size=(32, 64))[:3] == ["ResizeKeepRatio", "RandomCrop", flip]
    assert found(data_set="CIFAR")[:2] == ["RandomCrop", flip]
    assert found("--src", data_set="CIFAR")[:3] == ["Resize", "RandomCrop", flip]
    assert found(data_set="DIGITS")[:2] == ["RandomCrop", "AutoAugment"]

    resize, cropped, *_ = three_augment("--src", size=(48, 48), monkeypatch=monkeypatch)
    assert resize.size == 48 and resize.interpolation == transforms.InterpolationMode.BICUBIC
    assert (cropped.size, cropped.padding, cropped.padding_mode) == ((48, 48), 4, "reflect")
    jitter = three_augment("--color-jitter", "0.3", monkeypatch=monkeypatch)[3]
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.7, 1.3) and jitter.hue is None


def test_src_covers_height_and_width(monkeypatch) -> None:
    chain = transforms.Compose(three_augment("--src", size=(32, 64), monkeypatch=monkeypatch))
    for shape in ((90, 60), (60, 90), (20, 20)):
        assert chain(Image.new("RGB", shape)).shape == (3, 32, 64)


def blur_distance(image: np.ndarray, crop: np.ndarray) -> float:
    """Give the mean distance of an image to the nearest Gaussian blur of a crop."""
    blurs = (Image.fromarray(crop).filter(ImageFilter.GaussianBlur(float(r))) for r in np.arange(0.1, 2.01, 0.1))
    return min(np.abs(np.asarray(b).astype(int) - image).mean() for b in blurs)


def test_each_operation_is_applied_to_a_crop_with_reflected_borders(monkeypatch, photograph) -> None:
    chain = transforms.Compose(three_augment("--src", "--color-jitter", "0", monkeypatch=monkeypatch))
    padded = np.pad(np.asarray(photograph), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    crops += [np.ascontiguousarray(crop[:, ::-1]) for crop in crops]
    exact = {np.asarray(Image.fromarray(c).convert("L").convert("RGB")).tobytes(): ("grey", c) for c in crops}
    exact |= {np.asarray(ImageOps.solarize(Image.fromarray(c), 128)).tobytes(): ("solarised", c) for c in crops}
    counts, places = Counter(), set()
    for seed in range(120):
        random.seed(seed)
        torch.manual_seed(seed)
        image = restore(chain(photograph))
        kind, crop = exact.get(image.tobytes(), ("blurred", None))
        if crop is None:
            near = sorted(crops, key=lambda c: np.abs(c.astype(int) - image).mean())[:3]
            assert min(blur_distance(image, c) for c in near) < 1
        else:
            places.add(crop.tobytes())
        counts[kind] += 1
    assert set(counts) == {"grey", "solarised", "blurred"} and min(counts.values()) > 24
    assert len(places) > 50


def test_three_augment_is_the_same_for_the_same_seed_epoch_and_position(tree) -> None:
    flags = ["--data-set", "FOLDER", "--data-path", str(tree(count=1)), "--ThreeAugment"]
    train = datasets.build_train_dataset(parse(*flags), (32, 32))
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0)]
    images = [Seeded(train, seed)[key][0] for seed in (0, 1) for key in keys]
    again = [Seeded(train, seed)[key][0] for seed in (0, 1) for key in keys]
    assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--ThreeAugment", []),
        ("--ThreeAugment --src --color-jitter 0.3", []),
        ("--src", ["--src has no effect without --ThreeAugment"]),
        ("--ThreeAugment --aa none", ["--aa has no effect: --ThreeAugment takes its place"]),
        ("--ThreeAugment --reprob 0", ["--reprob has no effect: --ThreeAugment takes its place"]),
        ("--color-jitter 0.3", ["--color-jitter has no effect while --aa is on"]),
    ],
)
def test_flags_that_three_augment_gives_or_takes_effect(flags: str, said: list[str]) -> None:
    assert options.without_effect(parse("--data-set", "DIGITS", *flags.split())) == said


def test_three_augment_trains(tiny_flags) -> None:
    assert main.main([*tiny_flags, "--ThreeAugment", "--src", "--batch-size", "256"]) == 0
