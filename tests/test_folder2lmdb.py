"""The command that writes databases: what it writes, refuses, and leaves behind when it is stopped."""

import itertools
import os
import resource
import shutil
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import lmdb
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import datasets
import folder2lmdb
from data.lmdb import ImageDatabase
from util.config import AugmentConfig, DataConfig, ModelConfig
from util.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
CONFIG = ModelConfig("", input_size=(32, 32))


@pytest.fixture(scope="module")
def mixed(tree) -> Path:
    """Return train/ and val/ of files of many forms, some in folders of class folders and behind links."""
    root = tree(("ant", "bee", "Cat"), ("bee",), count=4)
    rgb = Image.open(root / "train" / "ant" / "0.jpg")
    forms = {"grey.JPEG": "L", "cmyk.jpg": "CMYK", "alpha.png": "RGBA", "palette.png": "P", "grey_alpha.PNG": "LA"}
    for folder in (root / "train" / "ant", root / "val" / "bee"):
        below = folder / "z" / "é"
        below.mkdir(parents=True)
        for file, mode in forms.items():
            rgb.convert(mode).save(below / file)
        (folder / "link").symlink_to(below.parent)
        (folder / "note.txt").write_text("no image")
    return root


@pytest.fixture
def small(tree, tmp_path) -> Path:
    """Return a folder to spoil, of 4 images in train/ and 4 in val/."""
    return Path(shutil.copytree(tree(count=2), tmp_path / "data"))


@pytest.fixture(autouse=True)
def restore_handler() -> Iterator[None]:
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


def run(*argv: object) -> int:
    return folder2lmdb.main([str(a) for a in argv])


def error_of(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """Return the last line of a command that fails with it; others only name images."""
    assert run(*argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("folder2lmdb.py: error: ")
    assert not any(line.startswith("folder2lmdb.py") for line in lines[:-1])
    return lines[-1]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_noise(folder: Path, count: int) -> None:
    """Write PNGs of half a megabyte."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise0.png", compress_level=0)
    for i in range(1, count):
        os.link(folder / "noise0.png", folder / f"noise{i}.png")


# what is written


def test_images_labels_classes_and_order_are_those_of_torchvision(mixed, tmp_path):
    assert run("--dir", mixed, "--out", tmp_path, "--workers", 3) == 0
    for split, count in (("train", 22), ("val", 14)):
        database = ImageDatabase(tmp_path / f"{split}.lmdb")
        expected = ImageFolder(mixed / split)
        assert len(database) == len(expected) == count
        assert database.classes == ["Cat", "ant", "bee"] and database.has_class_names
        assert [database.classes[label] for label in database.labels] == [expected.classes[t] for t in expected.targets]
        assert [str(mixed / split / path) for path in database.paths] == [path for path, _ in expected.samples]
        for i, (path, _) in enumerate(expected.samples):
            assert database[i][0] == Path(path).read_bytes()


def test_loaders_of_databases_give_the_batches_of_the_folders(mixed, tmp_path):
    assert run("--dir", mixed, "--out", tmp_path) == 0
    batches = []
    for root, use_lmdb in ((mixed, False), (tmp_path, True)):
        data = DataConfig("IMNET", str(root), lmdb=use_lmdb, num_workers=0)
        train = datasets.build_train_set(data, CONFIG, AugmentConfig())
        val = datasets.build_val_set(data, CONFIG)
        assert train.classes == val.classes == ["Cat", "ant", "bee"]
        assert list(val.targets) == [2] * 14
        train_loader = datasets.build_train_loader(train, data, batch_size=6, repeated_aug=True, seed=0)
        batches.append([*train_loader, *datasets.build_val_loader(val, data, batch_size=6)])
    assert len(batches[0]) == 11 + 3
    torch.testing.assert_close(*batches, rtol=0, atol=0)


def test_a_split_built_alone_is_matched_by_the_names_of_its_classes(tree, tmp_path):
    root = tree(("ant", "bee", "cat"), ("bee", "cat"), count=1)
    assert run("--dir", root, "--out", tmp_path, "--split", "train") == 0
    shutil.rmtree(root / "train")
    assert run("--dir", root, "--out", tmp_path) == 0
    numbers = {name: i for i, name in enumerate(ImageDatabase(tmp_path / "train.lmdb").classes)}
    path = tmp_path / "val.lmdb"
    val = datasets.DatabaseImages(path, None, numbers)
    assert ImageDatabase(path).labels.tolist() == [0, 1]
    assert val.targets.tolist() == [1, 2] and [label for _, label in val] == [1, 2] and type(val[0][1]) is int
    with pytest.raises(InputError, match=r"val.lmdb: class bee is not in the training set.* cat"):
        datasets.DatabaseImages(path, None, {"cat": 0})


def test_images_of_any_size_fit(small):
    write_noise(small / "train" / "ant", 25)  # 12 MB, where LMDB's own limit is 10
    assert run("--dir", small, "--split", "train", "--no-check", "--verify") == 0


def test_a_terabyte_of_images_would_fit(small, monkeypatch):
    """LMDB says what would fit, so that it need not be written."""
    limits = []

    def call(*args, **kwargs) -> lmdb.Environment:
        environment = lmdb.Environment(*args, **kwargs)
        limits.append(environment.info()["map_size"])
        return environment

    monkeypatch.setattr(lmdb, "open", call)
    assert run("--dir", small, "--split", "train") == 0
    assert limits[0] > 10**12


def test_what_is_there_is_replaced_only_when_asked(small, capsys):
    assert run("--dir", small, "--split", "val") == 0
    before = (small / "val.lmdb").read_bytes()
    assert "val.lmdb: exists; add --overwrite" in error_of(capsys, "--dir", small)
    # train.lmdb is not begun
    assert not (small / "train.lmdb").exists() and (small / "val.lmdb").read_bytes() == before
    (small / "val" / "bee" / "0.jpg").unlink()
    assert run("--dir", small, "--overwrite") == 0
    assert [len(ImageDatabase(small / f"{split}.lmdb")) for split in ("train", "val")] == [4, 3]
    assert names_in(small) == ["train", "train.lmdb", "val", "val.lmdb"]


# verifying


def test_databases_of_every_format_are_verified(small, tmp_path, capsys):
    for name, count in (("legacy_digits", 40), ("version1", 10), ("version1_converted", 40)):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(GOLDEN / f"{name}.lmdb", folder / "train.lmdb")
        assert run("--dir", folder, "--verify") == 0
        assert f"{folder}/train.lmdb: OK, {count} images" in capsys.readouterr().out
    for flags in (["--split", "val"], []):
        # the second one builds nothing, as there is something to check
        assert run("--dir", small, "--verify", *flags) == 0
        assert names_in(small) == ["train", "val", "val.lmdb"]


def test_verifying_one_split_does_not_look_at_the_other(small, capsys):
    assert run("--dir", small) == 0
    path = small / "val.lmdb"
    path.write_bytes(path.read_bytes()[:5000])
    capsys.readouterr()
    words = ["--dir", small, "--verify", "--split"]
    assert run(*words, "train") == 0
    assert capsys.readouterr().out.splitlines() == [f"{small}/train.lmdb: OK, 4 images"]
    assert str(path) in error_of(capsys, *words, "val")


def spoil_tree(data: bytes, image: bytes) -> bytes:
    """Change the type of every page except the first two: a crafted file can crash a process through LMDB itself."""
    pages = bytearray(data)
    for at in range(2 * 4096, len(pages), 4096):
        pages[at + 10] ^= 255
    return bytes(pages)


@pytest.mark.parametrize(
    ("spoil", "where"),
    # what lmdb's own verifier finds, comes first
    [
        (lambda data, image: data.replace(image, bytes(len(image))), "val.lmdb: image 2 (bee/0.jpg): "),
        (lambda data, _: data.replace(b"bee/0", b"bed/0"), "val.lmdb: "),
        (spoil_tree, "val.lmdb: damaged"),
    ],
)
def test_verifying_finds_any_damage(small, capsys, spoil, where):
    assert run("--dir", small) == 0
    path = small / "val.lmdb"
    damaged = spoil(path.read_bytes(), (small / "val" / "bee" / "0.jpg").read_bytes()[100:500])
    assert damaged != path.read_bytes()
    path.unlink()
    path.write_bytes(damaged)
    capsys.readouterr()
    assert run("--dir", small, "--verify") == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{small}/train.lmdb: OK, 4 images"]
    assert f"{small}/{where}" in err and f"folder2lmdb.py --dir {small} --overwrite" in err.splitlines()[-1]


# what the user can fix


def test_unreadable_images_are_named_and_left_out_or_taken_unseen_when_asked(small, capsys):
    cut = small / "train" / "ant" / "0.jpg"
    text = small / "train" / "bee" / "1.png"
    # only decoding it all shows it
    cut.write_bytes(cut.read_bytes()[:-200])
    text.write_text("not an image")
    assert run("--dir", small) == 2
    *named, error = capsys.readouterr().err.splitlines()
    assert [line.partition(": not a readable image")[0] for line in named] == [str(cut), str(text)]
    assert f"{small}/train: 2 unreadable images" in error and "--skip-corrupt" in error
    assert names_in(small) == ["train", "val"]

    words = ["--dir", small, "--split", "train"]
    assert run(*words, "--skip-corrupt") == 0
    assert "2 unreadable ones left out" in capsys.readouterr().out
    assert list(ImageDatabase(small / "train.lmdb").paths) == ["ant/1.png", "bee/0.jpg"]
    assert run(*words, "--no-check", "--overwrite") == 0
    images = datasets.DatabaseImages(small / "train.lmdb", None)
    assert len(images) == 4
    with pytest.raises(InputError, match=r"train.lmdb: image 3 \(bee/1.png\): not a readable image"):
        images[3]


def test_a_split_without_a_readable_image_is_one_line_and_not_written(small, capsys):
    images = [path for path in (small / "train").rglob("*") if path.is_file()]
    for path in images:
        path.write_text("not an image")
    error = error_of(capsys, "--dir", small, "--skip-corrupt")
    assert f"{small}/train: {len(images)} unreadable" in error and "--skip-corrupt" not in error
    assert names_in(small) == ["train", "val"]


@pytest.mark.parametrize(
    ("flags", "value", "remedy"),
    [
        ("", "--dir", ""),
        ("--dir nowhere", "--dir nowhere", "train/CLASS/"),
        ("--dir data/train", "--dir data/train", "neither train/ nor val/"),
        ("--dir data --split test", "'test'", "train"),
        ("--dir data --out nowhere", "nowhere", "--out"),
        ("--dir data --out full", "full/val.lmdb", "--out"),
    ],
)
def test_what_the_user_can_fix_is_one_line(small, tmp_path, capsys, monkeypatch, flags, value, remedy):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full" / "val.lmdb").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    line = error_of(capsys, *flags.split())
    assert value in line and remedy in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fills_up_is_one_line(small, capsys):
    """The nearest thing to a full disk is a limit on the size of files."""
    write_noise(small / "train" / "ant", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        line = error_of(capsys, "--dir", small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "train.lmdb: cannot be written" in line and "--out" in line
    assert names_in(small) == ["train", "val"]


# stopped in the middle


def signal_at(patch: pytest.MonkeyPatch, number: int, module: ModuleType, name: str, n: int) -> None:
    """Have this process receive a signal at the n-th call of a library's function."""
    function = getattr(module, name)
    calls = itertools.count(1)

    def call(*args, **kwargs) -> object:
        if next(calls) == n:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    patch.setattr(module, name, call)


# checksums are taken of each image, and of the table
MOMENTS = [(lmdb, "open", 1), (zlib, "crc32", 1), (zlib, "crc32", 4), (pa.ipc, "new_file", 1), (os, "replace", 1)]


def test_a_stopped_build_leaves_nothing(small, monkeypatch):
    for i, moment in enumerate(MOMENTS):
        with monkeypatch.context() as patch:
            signal_at(patch, (signal.SIGINT, signal.SIGTERM)[i % 2], *moment)
            assert run("--dir", small) == 130
        assert names_in(small) == ["train", "val"]


def test_a_killed_build_leaves_nothing_that_is_taken_for_a_database(small, monkeypatch, capsys):
    left = small / ".train.lmdb.tmp"
    for moment in MOMENTS:
        child = os.fork()
        if not child:
            signal_at(monkeypatch, signal.SIGKILL, *moment)
            run("--dir", small)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert names_in(small) == [left.name, "train", "val"]
        line = error_of(capsys, "--dir", small)
        assert f"{left}: " in line and "remove it" in line
        left.unlink()
    assert run("--dir", small, "--verify") == 0
