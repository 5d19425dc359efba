"""The data sets that torchvision reads, on small files of the real formats, and class folders of other names."""

import gzip
import json
import re
import shutil
import struct
import subprocess
import tarfile
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import utils

import datasets
import export
import main
import predict
from data.images import ImageArray, ImageFiles
from util.config import TORCHVISION_SETS, AugmentConfig, DataConfig, ModelConfig
from util.errors import InputError

# pixels, uint8 [H, W, 3], or a file's path below the root, with its class number
Pairs = list[tuple[np.ndarray | str, int]]
RNG = np.random.default_rng(0)
# of a training set and a validation set: 12 and 6 images, with every class
ORDERS = ([1, 0, 2, 2, 1, 0, 0, 1, 2, 1, 0, 2], [2, 1, 0, 1, 2, 0])


def save_image(path: Path, size: tuple[int, int] = (40, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)


def write_svhn(root: Path) -> tuple[Pairs, Pairs]:
    def write(split: str, order: list[int]) -> Pairs:
        pixels = RNG.integers(0, 256, (32, 32, 3, len(order)), dtype=np.uint8)
        # the digit 0 has the label 10
        labels = [label or 10 for label in order]
        savemat(root / f"{split}_32x32.mat", {"X": pixels, "y": np.array(labels, np.uint8)[:, None]})
        return [(pixels[..., i], label) for i, label in enumerate(order)]

    return write("train", ORDERS[0]), write("test", ORDERS[1])


def write_idx(folder: Path) -> tuple[Pairs, Pairs]:
    def write(split: str, order: list[int]) -> Pairs:
        grey = RNG.integers(0, 256, (len(order), 28, 28), dtype=np.uint8)
        header = struct.pack(">4I", 0x803, len(order), 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + grey.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, len(order)) + bytes(order))
        return [(np.stack([image] * 3, axis=2), label) for image, label in zip(grey, order, strict=True)]

    folder.mkdir(parents=True)
    return write("train", ORDERS[0]), write("t10k", ORDERS[1])


def write_stl10(root: Path) -> tuple[Pairs, Pairs]:
    folder = root / "stl10_binary"

    def write(split: str, order: list[int]) -> Pairs:
        pixels = RNG.integers(0, 256, (len(order), 96, 96, 3), dtype=np.uint8)
        # channel by channel, column by column
        (folder / f"{split}_X.bin").write_bytes(pixels.transpose(0, 3, 2, 1).tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(label + 1 for label in order))
        return list(zip(pixels, order, strict=True))

    folder.mkdir()
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    (folder / "unlabeled_X.bin").write_bytes(bytes(96 * 96 * 3))
    return write("train", ORDERS[0]), write("test", ORDERS[1])


def write_eurosat(root: Path) -> Pairs:
    pairs = []
    for label, name in enumerate(("AnnualCrop", "Forest", "River")):
        for i in range(5):
            path = root / "eurosat" / "2750" / name / f"{name}_{i + 1}.jpg"
            save_image(path, (64, 64))
            pairs.append((str(path.relative_to(root)), label))
    return pairs


def write_flowers(root: Path) -> tuple[Pairs, Pairs]:
    folder = root / "flowers-102"
    # images are numbered in no order of their splits
    labels = ORDERS[1] + ORDERS[0]
    ids = {"trnid": [9, 7, 8, 10, 11, 12, 13], "valid": [14, 18, 16, 17, 15], "tstid": [1, 2, 3, 6, 5, 4]}
    for i in range(1, 19):
        save_image(folder / "jpg" / f"image_{i:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8) + 1})
    savemat(folder / "setid.mat", {name: np.array([values], np.uint16) for name, values in ids.items()})

    def pairs(values: list[int]) -> Pairs:
        return [(f"flowers-102/jpg/image_{i:05d}.jpg", labels[i - 1]) for i in values]

    return pairs(ids["trnid"] + ids["valid"]), pairs(ids["tstid"])


def write_pets(root: Path) -> tuple[Pairs, Pairs]:
    folder = root / "oxford-iiit-pet"
    names = ("Abyssinian", "american_bulldog", "Birman")
    (folder / "annotations").mkdir(parents=True)

    def write(split: str, order: list[int]) -> Pairs:
        ids = [f"{names[label]}_{len(order)}{i}" for i, label in enumerate(order)]
        lines = [f"{name} {label + 1} {1 + label % 2} 1\n" for name, label in zip(ids, order, strict=True)]
        (folder / "annotations" / f"{split}.txt").write_text("".join(lines))
        for name in ids:
            save_image(folder / "images" / f"{name}.jpg")
        return [(f"oxford-iiit-pet/images/{name}.jpg", label) for name, label in zip(ids, order, strict=True)]

    return write("trainval", ORDERS[0]), write("test", ORDERS[1])


def write_dtd(root: Path) -> tuple[Pairs, Pairs]:
    folder = root / "dtd" / "dtd"
    names = ("banded", "blotchy", "braided")
    (folder / "labels").mkdir(parents=True)

    def write(split: str, order: list[int]) -> Pairs:
        files = [f"{names[label]}/{names[label]}_{split}{i}.jpg" for i, label in enumerate(order)]
        # of ten partitions the first counts
        (folder / "labels" / f"{split}1.txt").write_text("".join(f"{file}\n" for file in files))
        (folder / "labels" / f"{split}2.txt").write_text("braided/other.jpg\n")
        for file in files:
            save_image(folder / "images" / file)
        return [(f"dtd/dtd/images/{file}", label) for file, label in zip(files, order, strict=True)]

    return write("train", ORDERS[0][:8]) + write("val", ORDERS[0][8:]), write("test", ORDERS[1])


def write_aircraft(root: Path) -> tuple[Pairs, Pairs]:
    folder = root / "fgvc-aircraft-2013b" / "data"
    names = ("707-320", "Boeing 717", "C-130")
    folder.mkdir(parents=True)
    (folder / "variants.txt").write_text("".join(f"{name}\n" for name in names))

    def write(split: str, order: list[int]) -> Pairs:
        ids = [f"{len(order)}{i:05d}" for i in range(len(order))]
        lines = [f"{number} {names[label]}\n" for number, label in zip(ids, order, strict=True)]
        (folder / f"images_variant_{split}.txt").write_text("".join(lines))
        for number in ids:
            save_image(folder / "images" / f"{number}.jpg")
        at = "fgvc-aircraft-2013b/data/images"
        return [(f"{at}/{number}.jpg", label) for number, label in zip(ids, order, strict=True)]

    return write("trainval", ORDERS[0]), write("test", ORDERS[1])


def write_food(root: Path) -> tuple[Pairs, Pairs]:
    folder = root / "food-101"
    names = ("apple_pie", "baklava", "churros")
    (folder / "meta").mkdir(parents=True)

    def write(split: str, order: list[int]) -> Pairs:
        files = {name: [f"{name}/{split}{i}" for i in range(order.count(k))] for k, name in enumerate(names)}
        # classes are numbered by the alphabet, and not by the file
        listed = {name: files[name] for name in reversed(names)}
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))
        pairs = [(f"food-101/images/{file}.jpg", names.index(name)) for name in listed for file in listed[name]]
        for file, _ in pairs:
            save_image(root / file)
        return pairs

    return write("train", ORDERS[0]), write("test", ORDERS[1])


WRITE: dict[str, Callable[[Path], tuple[Pairs, Pairs] | Pairs]] = {
    "SVHN": write_svhn,
    "MNIST": lambda root: write_idx(root / "MNIST" / "raw"),
    "FASHION": lambda root: write_idx(root / "FashionMNIST" / "raw"),
    "STL10": write_stl10,
    "EUROSAT": write_eurosat,
    "FLOWERS": write_flowers,
    "DTD": write_dtd,
    "PETS": write_pets,
    "AIRCRAFT": write_aircraft,
    "FOOD": write_food,
}
# the first classes, of how many
CLASSES = {
    "SVHN": (["0", "1", "2"], 10),
    "MNIST": (["0 - zero", "1 - one", "2 - two"], 10),
    "FASHION": (["T-shirt/top", "Trouser", "Pullover"], 10),
    "STL10": (["airplane", "bird", "car"], 3),
    "EUROSAT": (["AnnualCrop", "Forest", "River"], 3),
    "FLOWERS": (["pink primrose", "hard-leaved pocket orchid", "canterbury bells"], 102),
    "DTD": (["banded", "blotchy", "braided"], 3),
    "PETS": (["Abyssinian", "American Bulldog", "Birman"], 3),
    "AIRCRAFT": (["707-320", "Boeing 717", "C-130"], 3),
    "FOOD": (["apple_pie", "baklava", "churros"], 3),
}
NATIVE = {"SVHN": 32, "MNIST": 28, "FASHION": 28, "STL10": 96, "EUROSAT": 64}


@pytest.fixture(autouse=True)
def small_and_offline(monkeypatch) -> None:
    """Have torchvision take any checksum, and reach no other machine."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(utils, "check_md5", lambda *args, **kwargs: True)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def load(name: str, root: Path, train: bool) -> ImageArray | ImageFiles:
    return datasets.build_dataset(DataConfig(name, str(root)), train, ModelConfig(""), None)


@pytest.mark.parametrize("name", [name for name in WRITE if name != "EUROSAT"])
def test_a_named_set_has_the_files_images_and_labels(name, tmp_path):
    written = WRITE[name](tmp_path)
    for train, pairs in zip((True, False), written, strict=True):
        found = load(name, tmp_path, train)
        first, count = CLASSES[name]
        assert found.classes[:3] == first and len(found.classes) == count and len(found) == len(pairs)
        assert found.targets == [label for _, label in pairs]
        if isinstance(found, ImageArray):
            np.testing.assert_array_equal(found.data, [pixels for pixels, _ in pairs])
        else:
            assert found.files == [str(tmp_path / file) for file, _ in pairs]
        assert found[4][1] == pairs[4][1]


def test_eurosat_is_split_by_class_always_in_the_same_way(tmp_path):
    pairs = set(write_eurosat(tmp_path))
    found = [load("EUROSAT", tmp_path, train) for train in (True, False, False)]
    train, val, again = (set(zip(split.files, split.targets, strict=True)) for split in found)
    assert train | val == {(str(tmp_path / file), label) for file, label in pairs} and not train & val
    assert val == again and Counter(label for _, label in val) == {0: 1, 1: 1, 2: 1}
    assert found[0].classes == CLASSES["EUROSAT"][0]


@pytest.mark.parametrize("name", WRITE)
def test_a_named_set_trains_and_its_checkpoint_evaluates_without_flags(name, tmp_path, capfd):
    WRITE[name](tmp_path)
    saved = tmp_path / "out" / "checkpoint.pth"
    side = NATIVE.get(name, 32)
    flags = f"{TINY} --data-set {name} --input-size {side} --batch-size 12 --mixup 0 --cutmix 0 --no-model-ema"
    assert main.main([*flags.split(), "--data-path", str(tmp_path), "--output_dir", str(saved.parent)]) == 0
    first, count = CLASSES[name]
    classes = torch.load(saved)["classes"]
    assert classes[:3] == first and len(classes) == count
    loss = json.loads((saved.parent / "log.txt").read_text())["test_loss"]
    grey = name in ("MNIST", "FASHION")
    assert capfd.readouterr().out.count("grey images become RGB") == grey
    assert main.main(["--eval", "--resume", str(saved), "--device", "cpu", "--num_workers", "0"]) == 0
    out = capfd.readouterr().out
    assert f"loss {loss:.3f}" in out and out.count("grey images become RGB") == grey


def test_pictures_predictions_and_exports_of_a_named_set_need_no_flags(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (pixels, _), *_ = write_idx(tmp_path / "FashionMNIST" / "raw")[1]
    Image.fromarray(pixels).convert("L").save("shirt.png")
    flags = f"{TINY} --data-set FASHION --data-path . --input-size 28 --batch-size 12 --output_dir out"
    assert main.main(flags.split()) == 0
    resume = "--resume out/checkpoint.pth --output_dir out --device cpu"
    assert main.main(f"--visualize attention --n_visualization 2 {resume}".split()) == 0
    assert list(Path("out/visualization").iterdir())
    assert export.main("--checkpoint out/checkpoint.pth --out exported".split()) == 0
    # 28 px are neither resized nor cropped, here and there
    assert json.loads(Path("exported/config.json").read_text())["pretrained_cfg"]["crop_pct"] == 1.0
    answers = []
    for checkpoint in ("out/checkpoint.pth", "exported"):
        capfd.readouterr()
        command = f"shirt.png --checkpoint {checkpoint} --topk 10 --json --device cpu --num_workers 0"
        assert predict.main(command.split()) == 0
        answers.append(json.loads(capfd.readouterr().out)[0]["predictions"])
    assert {row["class"] for row in answers[0]} == set(TORCHVISION_SETS["FASHION"].cls.classes)
    assert [row["class"] for row in answers[1]] == [row["class"] for row in answers[0]]


@pytest.mark.parametrize("name", [*WRITE, "CIFAR", "DIGITS", "FOLDER"])
def test_images_of_native_size_are_padded_and_cropped_and_digits_are_not_mirrored(name, monkeypatch):
    monkeypatch.setattr(datasets, "build_dataset", lambda data, train, config, transform: transform)
    native = {**NATIVE, "CIFAR": 32, "DIGITS": 32}.get(name)
    for side in (32, 28, 64, 96, 224):
        config = ModelConfig("", input_size=(side, side))
        data = DataConfig(name, transform="timm")
        steps = [type(step).__name__ for step in datasets.build_train_set(data, config, AugmentConfig()).transforms]
        assert ("RandomCrop" in steps) == (side == native or (name == "DIGITS" and side < 32))
        assert ("RandomHorizontalFlip" in steps) == (name not in ("SVHN", "MNIST", "DIGITS"))


IDX = [f"{split}-{part}-ubyte" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1")]
# archives and files below the root, and what is packed in them
PACKED = {
    "SVHN": {"train_32x32.mat": "train_32x32.mat", "test_32x32.mat": "test_32x32.mat"},
    "MNIST": {f"MNIST/raw/{file}.gz": f"MNIST/raw/{file}" for file in IDX},
    "FASHION": {f"FashionMNIST/raw/{file}.gz": f"FashionMNIST/raw/{file}" for file in IDX},
    "STL10": {"stl10_binary.tar.gz": "stl10_binary"},
    "EUROSAT": {"eurosat/EuroSAT.zip": "eurosat/2750"},
    "FLOWERS": {
        "flowers-102/102flowers.tgz": "flowers-102/jpg",
        "flowers-102/imagelabels.mat": "flowers-102/imagelabels.mat",
        "flowers-102/setid.mat": "flowers-102/setid.mat",
    },
    "DTD": {"dtd/dtd-r1.0.1.tar.gz": "dtd/dtd"},
    "PETS": {f"oxford-iiit-pet/{part}.tar.gz": f"oxford-iiit-pet/{part}" for part in ("images", "annotations")},
    "AIRCRAFT": {"fgvc-aircraft-2013b.tar.gz": "fgvc-aircraft-2013b"},
    "FOOD": {"food-101.tar.gz": "food-101"},
}


def pack(source: Path, archive: Path) -> None:
    """Write an archive of a file or folder as its name says, at the same level."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in source.rglob("*.jpg"):
                file.write(path, path.relative_to(source.parent))
    elif archive.name.endswith("ubyte.gz"):
        archive.write_bytes(gzip.compress(source.read_bytes()))
    elif archive.suffix == ".mat":
        shutil.copy(source, archive)
    else:
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(source, source.name)


@pytest.mark.parametrize("name", WRITE)
def test_a_missing_set_says_what_to_put_where_and_takes_what_was_put_there(name, tmp_path):
    full, root = tmp_path / "full", tmp_path / "here"
    full.mkdir()
    WRITE[name](full)
    with pytest.raises(InputError) as caught:
        load(name, root, True)
    line = str(caught.value)
    # torchvision's error names only the first file of MNIST that it tried
    assert "\n" not in line and ("no network" in line or "train-images" in line)
    where, urls = re.fullmatch(r"(.+?): missing or damaged.*; put (\S+) there, and .*", line).groups()
    urls = subprocess.run(["bash", "-c", f"echo {urls}"], capture_output=True, text=True).stdout.split()
    files = [Path(where) if Path(where).name in url else Path(where, url.rpartition("/")[2]) for url in urls]
    assert sorted(files) == sorted(root / file for file in PACKED[name])

    # put there, they are taken without a download
    for file, source in PACKED[name].items():
        pack(full / source, root / file)
    assert load(name, root, True).targets == load(name, full, True).targets


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("SVHN", "test_32x32.mat"),
        ("MNIST", "MNIST/raw/t10k-images-idx3-ubyte"),
        ("STL10", "stl10_binary/test_X.bin"),
        ("FLOWERS", "flowers-102/setid.mat"),
        ("PETS", "oxford-iiit-pet/annotations/test.txt"),
        ("FOOD", "food-101/meta/test.json"),
    ],
)
def test_a_damaged_file_is_one_line(name, damaged, tmp_path):
    WRITE[name](tmp_path)
    path = tmp_path / damaged
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError) as caught:
        load(name, tmp_path, False)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


REAL = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not REAL.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_real_fashion_mnist(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for file in IDX:
        (folder / file).write_bytes(gzip.decompress((REAL / f"{file}.gz").read_bytes()))
    for train, split, count in ((True, "train", 60_000), (False, "t10k", 10_000)):
        found = load("FASHION", tmp_path, train)
        labels = np.fromfile(folder / f"{split}-labels-idx1-ubyte", np.uint8)[8:]
        grey = np.fromfile(folder / f"{split}-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
        assert found.targets == labels.tolist() and Counter(found.targets) == dict.fromkeys(range(10), count // 10)
        assert all((found.data[..., channel] == grey).all() for channel in range(3))


def test_folders_of_other_names_are_kept_in_the_checkpoint(tree, tmp_path, capfd):
    root = tmp_path / "data"
    shutil.copytree(tree(count=4), root)
    (root / "train").rename(root / "training")
    (root / "val").rename(root / "test")
    flags = f"{TINY} --data-set FOLDER --train-split training --val-split test --batch-size 4 --data-path {root}"
    saved = tmp_path / "out" / "checkpoint.pth"
    assert main.main([*flags.split(), "--output_dir", str(saved.parent)]) == 0
    loss = json.loads((saved.parent / "log.txt").read_text())["test_loss"]
    capfd.readouterr()
    evaluate = ["--eval", "--resume", str(saved), "--device", "cpu", "--num_workers", "0"]
    assert main.main(evaluate) == 0
    assert f"loss {loss:.3f}" in capfd.readouterr().out
    # flags that are given win
    (root / "test").rename(root / "held-out")
    assert main.main([*evaluate, "--val-split", "held-out"]) == 0
    assert f"loss {loss:.3f}" in capfd.readouterr().out


def test_checkpoints_from_before_the_flags_evaluate(tmp_path, tiny_run):
    saved = torch.load(tiny_run / "checkpoint.pth")
    saved["data"] = {name: saved["data"][name] for name in ("name", "root", "lmdb", "inat_category")}
    torch.save(saved, tmp_path / "old.pth")
    assert main.main(["--eval", "--resume", str(tmp_path / "old.pth"), "--device", "cpu", "--num_workers", "0"]) == 0
