"""The reader of image databases: every format, in workers of every kind, and damaged or foreign files."""

import copy
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from unittest.mock import Mock

import lmdb
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

import datasets
import folder2lmdb
from data.lmdb import ImageDatabase
from util.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
# by the published script; by version 1 of ours: from folders named after digits, and converted from the published one
PUBLISHED = GOLDEN / "legacy_digits.lmdb"
VERSION_1 = GOLDEN / "version1.lmdb"
CONVERTED = GOLDEN / "version1_converted.lmdb"


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory) -> Path:
    """Return a database of 8 images in each of two classes."""
    out = tmp_path_factory.mktemp("databases")
    assert folder2lmdb.main(["--dir", str(tree()), "--out", str(out)]) == 0
    return out / "train.lmdb"


@pytest.fixture
def path(built, tmp_path) -> Path:
    """Return a copy of `built` to spoil."""
    return Path(shutil.copy(built, tmp_path / "train.lmdb"))


def write_database(path: Path, count: int, changes: dict | None = None, classes: int = 1000) -> None:
    """Write a database as the docstring of data/lmdb.py describes it; `changes` are made to the header."""
    labels = [i * classes // count for i in range(count)]
    names = [f"n{i:08d}" for i in range(classes)]
    columns = {
        "label": pa.array(labels, pa.int32()),
        "crc32": pa.array([zlib.crc32(b"%d" % i) for i in range(count)], pa.uint32()),
        "path": pa.array([f"{names[label]}/{i}.JPEG".encode() for i, label in enumerate(labels)], pa.large_binary()),
    }
    table = pa.table(columns, metadata={"classes": json.dumps(names), "named": "true"})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    content = sink.getvalue().to_pybytes()
    header = {"format": "image folder", "version": 2, "count": count, "table": [len(content), zlib.crc32(content)]}
    records = [(i.to_bytes(8, "big"), b"%d" % i) for i in range(count)]
    write_records(path, *records, (b"table", content), (b"header", json.dumps(header | (changes or {})).encode()))


def write_records(path: Path, *records: tuple[bytes, bytes]) -> None:
    with lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 30) as environment:
        with environment.begin(write=True) as transaction:
            transaction.cursor().putmulti(records)


# what is read


@pytest.mark.parametrize("source", [PUBLISHED, VERSION_1, CONVERTED], ids=lambda path: path.stem)
def test_every_image_of_an_older_format_is_a_digit_with_its_label(source):
    database = ImageDatabase(source)
    names = list("0123456789")
    if source == VERSION_1:
        names = sorted("zero one two three four five six seven eight nine".split())
        digits = [int(Path(path).stem) for path in database.paths]
        assert list(database.paths) == [f"{name}/{i}.png" for name, i in zip(names, digits, strict=True)]
    else:
        digits = range(40)
        assert database.paths is None
    assert database.classes == names and database.has_class_names == (source == VERSION_1)
    assert len(database) == len(digits)
    raw = load_digits()
    for i, digit in enumerate(digits):
        data, label = database[i]
        assert label == (i if source == VERSION_1 else raw.target[digit])
        assert np.array_equal(np.asarray(Image.open(BytesIO(data))), np.rint(raw.images[digit] * (255 / 16)))


def test_opening_is_quick_whatever_the_number_of_images(tmp_path, monkeypatch):
    path = tmp_path / "train.lmdb"
    write_database(path, 5000)
    monkeypatch.setattr(lmdb, "open", Mock(wraps=lmdb.open))
    database = ImageDatabase(path)
    # a view of the file
    assert not database.labels.flags.owndata and not database.labels.flags.writeable
    # all readers of a file in a process have one environment
    assert ImageDatabase(path)[4999] == (b"4999", 999) and lmdb.open.call_count == 1
    assert set(database.labels.tolist()) == set(range(1000))
    assert database.paths[4999] == "n00000999/4999.JPEG"


def test_copies_pickles_links_and_compacted_files_read_on(built, tmp_path, monkeypatch):
    database = ImageDatabase(built)
    (tmp_path / "link.lmdb").symlink_to(built)
    monkeypatch.chdir(built.parent)
    relative = ImageDatabase(built.name)
    monkeypatch.chdir(tmp_path)
    assert len(pickle.dumps(database)) < 500  # no table travels to a worker
    with lmdb.open(shutil.copy(built, "whole"), subdir=False, lock=False) as environment:
        environment.copy("compacted.lmdb", compact=True)
    copies = [copy.deepcopy(database), pickle.loads(pickle.dumps(relative))]
    for other in (*copies, ImageDatabase("link.lmdb"), ImageDatabase("compacted.lmdb")):
        # iterating ends with the images
        assert list(other) == list(database) and list(other.paths) == list(database.paths)
    for index in (-1, 16):
        with pytest.raises(IndexError):
            database[index]


def test_reading_writes_nothing_and_needs_no_right_to(path):
    before = path.read_bytes()
    database = ImageDatabase(path)
    assert len(list(database)) == 16
    assert os.listdir(path.parent) == [path.name] and path.read_bytes() == before
    folder = Path("/proc/self/fd")
    handles = [handle for handle in os.listdir(folder) if os.path.realpath(folder / handle) == str(path)]
    flags = [Path(f"/proc/self/fdinfo/{handle}").read_text().split()[3] for handle in handles]
    assert flags and all(int(flag, 8) & os.O_ACCMODE == os.O_RDONLY for flag in flags)


def test_a_database_that_was_replaced_is_read_anew(path, tmp_path):
    old = ImageDatabase(path)
    first = old[0]
    pickled = pickle.dumps(old)
    os.replace(shutil.copy(PUBLISHED, tmp_path / "new"), path)
    assert len(ImageDatabase(path)) == 40
    assert len(old) == 16 and old[0] == first
    # labels in the parent and images in a worker must be of one file
    write_database(tmp_path / "other", 16)
    os.replace(tmp_path / "other", path)
    with pytest.raises(InputError, match=f"{path}: replaced"):
        pickle.loads(pickled)


# in other processes


def shrink(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image.convert("RGB").resize((16, 16)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # two workers on one core
@pytest.mark.parametrize(
    ("source", "method"),
    [
        ("built", "fork"),
        (PUBLISHED, "fork"),
        # these workers take seconds to start
        pytest.param("built", "spawn", marks=pytest.mark.slow),
        pytest.param(PUBLISHED, "forkserver", marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "stem", value),
)
def test_workers_read_what_the_parent_reads_before_and_after(built, source, method):
    source = built if source == "built" else source
    # a file as training and as validation set, side by side
    sets = [datasets.DatabaseImages(source, shrink) for _ in range(2)]
    expected = [sets[0][i] for i in range(len(sets[0]))]
    how = {"batch_size": 6, "num_workers": 2, "multiprocessing_context": method, "persistent_workers": True}
    loaders = [DataLoader(images, **how) for images in sets]
    for _ in range(2):
        for batches in zip(*zip(*loaders, strict=True), strict=True):
            images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
            assert torch.equal(images, torch.stack([image for image, _ in expected]))
            assert targets.tolist() == [label for _, label in expected]
    assert all(torch.equal(sets[1][i][0], image) for i, (image, _) in enumerate(expected))


@pytest.mark.parametrize("count", [20, 5000])  # from some 2,000 on the table has a map of its own
def test_a_forked_child_may_use_whatever_its_parent_had_open(tmp_path, count):
    path = tmp_path / "train.lmdb"
    write_database(path, count)
    database = ImageDatabase(path)
    total = database.labels.sum()
    expected = database[3]
    child = os.fork()
    if not child:
        # LMDB forbids the use of an environment after a fork
        lmdb.open = Mock(wraps=lmdb.open)
        good = database.labels.sum() == total and database[3] == ImageDatabase(path)[3] == expected
        os._exit(not (good and lmdb.open.call_count == 1))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert database[3] == expected


# as a data set


@pytest.mark.parametrize("source", [PUBLISHED, CONVERTED], ids=lambda path: path.stem)
def test_a_label_beyond_the_training_classes_is_named(source):
    with pytest.raises(InputError, match="label 9 is not in the training set, .*a, b, c, d"):
        datasets.DatabaseImages(source, None, {c: i for i, c in enumerate("abcd")})


# damaged and foreign files


def write(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)


FAULTS = {
    "missing": (lambda path: None, "no such file"),
    "folder": (Path.mkdir, "not an image database"),
    "text": (write(b"x" * 50000), "not an image database"),
    "another program's": (lambda path: write_records(path, (b"something", b"else")), "not an image database"),
    "newer": (lambda path: write_database(path, 4, {"version": 3}), "of format image folder 3: update this program"),
    "no table": (lambda path: write_database(path, 4, {"table": None}), "not an image database, or damaged"),
    "cut": (write(PUBLISHED.read_bytes()[:81100]), "cut short, 81100 of 90112 bytes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_database_is_named_with_the_command_that_builds_one(tmp_path, fault):
    prepare, message = FAULTS[fault]
    prepare(tmp_path / "train.lmdb")
    with pytest.raises(InputError) as caught:
        ImageDatabase(tmp_path / "train.lmdb")
    assert str(caught.value).startswith(f"{tmp_path}/train.lmdb: {message}")
    command = f"python folder2lmdb.py --dir {tmp_path}{' --overwrite' if fault != 'missing' else ''}"
    assert str(caught.value).endswith(command) and "\n" not in str(caught.value)


def test_a_database_cut_short_anywhere_is_noticed_when_it_is_opened(path):
    whole = path.read_bytes()
    for length in (*range(1, 9000, 600), len(whole) // 2, len(whole) - 1):
        # another file, as the one before may still be open
        path.unlink()
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="train.lmdb: (cut short|not an image database)"):
            ImageDatabase(path)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_an_image_is_noticed_when_it_is_read(built, path):
    whole = list(ImageDatabase(built))
    image = whole[3][0]
    flip(path, path.read_bytes().index(image) + len(image) // 2)
    database = ImageDatabase(path)
    assert database[2] == whole[2]
    with pytest.raises(InputError, match=r"train.lmdb: image 3 \(ant/3.png\): missing or damaged; .*folder2lmdb"):
        database[3]


def test_a_flipped_bit_in_a_label_is_noticed_before_training(path):
    flip(path, path.read_bytes().index(np.repeat([0, 1], 8).astype(np.int32).tobytes()))
    with pytest.raises(InputError, match="train.lmdb: damaged labels"):
        datasets.DatabaseImages(path, None)
