"""The reader of databases: in workers of every kind, at any size, and before files that are none."""

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

import datasets
import folder2lmdb
import main
from folder2lmdb import HEADER, ImageDatabase, Writer
from util.errors import InputError

GOLDEN = Path(__file__).parent / "golden" / "legacy_digits.lmdb"
ROOT = Path(main.__file__).parent


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory) -> Path:
    """Give a folder of train.lmdb and val.lmdb, of 16 images each."""
    out = tmp_path_factory.mktemp("databases")
    assert folder2lmdb.main(["--dir", str(tree()), "--out", str(out)]) == 0
    return out


def shrink(image) -> torch.Tensor:
    return pil_to_tensor(image.resize((16, 16)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # two workers on one core
@pytest.mark.parametrize(
    ("method", "workers", "persistent"),
    [(None, 0, False), ("fork", 2, False), ("fork", 2, True), ("spawn", 2, True), ("forkserver", 2, False)],
)
def test_workers_of_any_kind_read_what_the_parent_reads_before_and_after(built, method, workers, persistent):
    train = datasets.DatabaseImages(built / "train.lmdb", shrink)
    other = datasets.DatabaseImages(built / "train.lmdb", shrink)  # the same file as validation set
    labels = train.records.labels  # a view that a worker inherits
    images = torch.stack([train[i][0] for i in range(16)])
    kwargs = {"num_workers": workers, "multiprocessing_context": method, "persistent_workers": persistent}
    both = (train, other) if method in (None, "fork") else (train,)  # a spawned worker takes seconds to start
    loaders = [DataLoader(each, batch_size=6, **kwargs) for each in both]
    for _ in range(2 if persistent else 1):
        batches = [[] for _ in loaders]
        for step in zip(*loaders, strict=True):  # side by side
            for batch, seen in zip(step, batches, strict=True):
                seen.append(batch)
        for seen in batches:
            found, targets = (torch.cat(parts) for parts in zip(*seen, strict=True))
            assert torch.equal(found, images) and targets.tolist() == labels.tolist() == [0] * 8 + [1] * 8
    assert all(torch.equal(other[i][0], images[i]) for i in range(16))


def test_a_forked_child_may_use_whatever_its_parent_had_open(built):
    records = ImageDatabase(built / "train.lmdb")
    labels, expected = records.labels, records[3]
    child = os.fork()
    if not child:
        good = labels.sum() == 8 and records[3] == ImageDatabase(built / "train.lmdb")[3] == expected
        os._exit(not good)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert records[3] == expected


def test_copies_pickles_and_links_read_on(built, tmp_path, monkeypatch):
    records = ImageDatabase(built / "train.lmdb")
    (tmp_path / "link.lmdb").symlink_to(built / "train.lmdb")
    monkeypatch.chdir(built)
    relative = ImageDatabase("train.lmdb")
    monkeypatch.chdir(tmp_path)
    assert len(pickle.dumps(records)) < 500  # no table travels to a worker
    for other in (
        copy.deepcopy(records),
        pickle.loads(pickle.dumps(records)),
        ImageDatabase("link.lmdb"),
        pickle.loads(pickle.dumps(relative)),
    ):
        assert other[7] == records[7] and other.paths[7] == records.paths[7] == "ant/7.png"


def test_reading_writes_nothing_and_needs_no_right_to(built):
    code = (
        "import sys, os; from pathlib import Path; from folder2lmdb import ImageDatabase; "
        "ImageDatabase(sys.argv[1])[0]; fds = Path('/proc/self/fd'); "
        "infos = [Path('/proc/self/fdinfo', fd).read_text().split() for fd in os.listdir(fds) "
        "if os.path.exists(fds / fd) and os.readlink(fds / fd) == sys.argv[1]]; "
        "assert infos and not any(int(i[i.index('flags:') + 1], 8) & 3 for i in infos), infos"
    )
    path = str((built / "train.lmdb").resolve())
    subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=True)
    assert sorted(p.name for p in built.iterdir()) == ["train.lmdb", "val.lmdb"]


def test_a_database_that_was_replaced_is_read_anew(built, tmp_path):
    path = tmp_path / "train.lmdb"
    shutil.copy(GOLDEN, path)
    old = ImageDatabase(path)
    first = old[0]
    shutil.copy(built / "train.lmdb", tmp_path / "new")
    os.replace(tmp_path / "new", path)
    assert len(ImageDatabase(path)) == 16 and ImageDatabase(path).paths[0] == "ant/0.jpg"
    assert len(old) == 40 and first[1] == 0


def test_a_compacted_copy_is_read_too(built, tmp_path):
    shutil.copy(built / "train.lmdb", tmp_path / "whole")
    with lmdb.open(str(tmp_path / "whole"), subdir=False, lock=False) as environment:
        environment.copy(str(tmp_path / "train.lmdb"), compact=True)
    records, copied = ImageDatabase(built / "train.lmdb"), ImageDatabase(tmp_path / "train.lmdb")
    assert list(copied) == list(records) and list(copied.paths) == list(records.paths) and copied.verify() == []


def test_iteration_ends_with_the_images(built):
    records = ImageDatabase(built / "train.lmdb")
    assert [label for _, label in records] == records.labels.tolist()
    for index in (-1, 16):
        with pytest.raises(IndexError, match=f"no image {index} among 16"):
            records[index]


def write_foreign(path: Path) -> None:
    with lmdb.open(str(path), subdir=False, lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"something", b"else")


def write_half(path: Path) -> None:
    writer = Writer(path, ["a"], True, 1 << 20)
    for i in range(40):
        writer.add(b"image" * 1000, 0, f"a/{i}.jpg")
    writer._flush()
    writer.close()


def write_header(path: Path, **changes) -> None:
    writer = Writer(path, ["a"], True, 1 << 20)
    writer.add(b"image", 0, "a/0.jpg")
    writer.finish()
    with writer.environment.begin(write=True) as transaction:
        header = json.loads(transaction.get(HEADER)) | changes
        transaction.put(HEADER, json.dumps(header).encode())
    writer.close()


def cut(source: Path, share: float):
    return lambda path: path.write_bytes(source.read_bytes()[: int(share * source.stat().st_size)])


FAULTS = {
    "missing": (lambda path: None, "no such file; --use-lmdb reads what "),
    "folder": (lambda path: path.mkdir(), "a folder, not an image database"),
    "empty": (lambda path: path.touch(), "not an image database but an empty file"),
    "text": (lambda path: path.write_bytes(b"x" * 50000), "not an image database, nor any other LMDB file"),
    "short text": (lambda path: path.write_bytes(b"x"), "not an image database, nor any other LMDB file"),
    "another program's": (write_foreign, "an LMDB file, but not an image database"),
    "half-written": (write_half, "half-written"),
    "fewer images": (lambda path: write_header(path, count=2), "half-written or damaged: 1 of 2 images"),
    "newer": (lambda path: write_header(path, version=2), "of format version 2, and this program reads up to 1: upd"),
    "other format": (lambda path: write_header(path, format="audio"), "an LMDB file of format 'audio', not an image"),
    "no count": (lambda path: write_header(path, count=None), "half-written or damaged"),
    "cut published": (cut(GOLDEN, 0.9), "cut short, 81100 of at least 90112 bytes"),
    "cut after a page": (cut(GOLDEN, 0.05), "cut short, 4505 of at least 90112 bytes"),
    "cut within a page": (cut(GOLDEN, 0.0005), "not an image database, nor any other LMDB file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_database_is_named_with_the_command_that_builds_one(tmp_path, fault):
    prepare, said = FAULTS[fault]
    prepare(tmp_path / "train.lmdb")
    with pytest.raises(InputError) as caught:
        ImageDatabase(tmp_path / "train.lmdb")
    assert str(caught.value).startswith(f"{tmp_path}/train.lmdb: {said}")
    assert f"python folder2lmdb.py --dir {tmp_path}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.999])
def test_a_database_cut_short_anywhere_is_noticed_when_it_is_opened(built, tmp_path, share):
    cut(built / "train.lmdb", share)(tmp_path / "train.lmdb")
    with pytest.raises(InputError, match="train.lmdb: (cut short|not an image database)"):
        ImageDatabase(tmp_path / "train.lmdb")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_an_image_is_noticed_when_it_is_read(built, tmp_path):
    path = tmp_path / "train.lmdb"
    shutil.copy(built / "train.lmdb", path)
    whole = ImageDatabase(path)[3][0]
    flip(path, path.read_bytes().index(whole) + len(whole) // 2)
    records = ImageDatabase(path)
    assert records[2] == ImageDatabase(built / "train.lmdb")[2]
    with pytest.raises(InputError, match=r"train.lmdb: image 3 \(ant/3.png\) is not as it was written"):
        records[3]


def test_a_flipped_bit_in_a_label_is_noticed_before_training(built, tmp_path):
    path = tmp_path / "train.lmdb"
    shutil.copy(built / "train.lmdb", path)
    offset, size = ImageDatabase(path).file.find(b"table")
    flip(path, path.read_bytes().index(np.array([0] * 8 + [1] * 8, np.int32).tobytes(), offset, offset + size))
    with pytest.raises(InputError, match="the checksum of its table of labels and paths does not match"):
        datasets.DatabaseImages(path)


MEASURE = """
import json, os, sys, time
from folder2lmdb import ImageDatabase

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

ImageDatabase(sys.argv[1])  # what Arrow sets up once
before, start = resident(), time.perf_counter()
records = ImageDatabase(sys.argv[2])
found = [time.perf_counter() - start, resident() - before]
child = os.fork() if sys.argv[3] == "fork" else 1
if not child:
    before, start = resident(), time.perf_counter()
    records = ImageDatabase(sys.argv[2])
    found = [time.perf_counter() - start, resident() - before]
    assert records[len(records) // 2][1] == records.labels[len(records) // 2]
    print(json.dumps(found), flush=True)
    os._exit(0)
if child == 1:
    print(json.dumps(found))
else:
    os.waitpid(child, 0)
"""


def write_tiny(path: Path, count: int) -> None:
    classes = [f"n{i:08d}" for i in range(1000)]
    writer = Writer(path, classes, True, 1 << 30)
    for i in range(count):
        label = i * 1000 // count
        writer.add(b"%d" % i, label, f"{classes[label]}/{classes[label]}_{i}.JPEG")
    writer.finish()
    writer.close()


@pytest.mark.parametrize("count", [1000, pytest.param(1_281_167, marks=pytest.mark.slow)])
def test_opening_costs_the_same_whatever_the_number_of_images(built, tmp_path, count):
    path = tmp_path / "train.lmdb"
    write_tiny(path, count)
    for where in ("parent", "fork"):
        command = [sys.executable, "-c", MEASURE, str(built / "val.lmdb"), str(path), where]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds, grown = json.loads(done.stdout)
        print(f"{count} images, {where}: {1e3 * seconds:.1f} ms, {grown / 1e6:.2f} MB")
        assert seconds < 0.05 and grown < 10e6
    records = ImageDatabase(path)
    assert records[count - 1] == (b"%d" % (count - 1), 999)
    assert np.array_equal(np.bincount(records.labels) > 0, np.ones(1000, bool))


def children(pid: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1] == str(pid):
                    found.append(int(entry))
            except OSError:
                pass
    return found


def alive(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_workers_end_when_the_training_that_reads_a_database_is_killed(built, tiny_flags, tmp_path):
    flags = [*tiny_flags, "--data-set", "FOLDER", "--data-path", str(built), "--use-lmdb", "--batch-size", "4"]
    flags += ["--input-size", "32", "--num_workers", "2", "--epochs", "1000"]
    rng = np.random.default_rng(0)
    for _ in range(20):
        command = [sys.executable, "-W", "ignore", main.__file__, *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        end = time.monotonic() + 120
        while len(workers := children(process.pid)) < 2:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 2))
        workers = sorted({*workers, *children(process.pid)})
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        end = time.monotonic() + 30
        while any(alive(pid) for pid in workers):
            assert time.monotonic() < end, "a worker outlives its training"
            time.sleep(0.1)
    assert ImageDatabase(built / "train.lmdb").verify() == []
