"""The command that writes databases: what it writes, refuses, and leaves behind when it is stopped."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

import datasets
import folder2lmdb
import main
from folder2lmdb import ImageDatabase
from util import class_folders
from util.errors import InputError

GOLDEN = Path(__file__).parent / "golden" / "legacy_digits.lmdb"
COMMAND = [sys.executable, folder2lmdb.__file__]


@pytest.fixture(scope="module")
def mixed(tree) -> Path:
    """Give train/ and val/ of files of many forms, some in folders of class folders and behind links."""
    root = tree(("ant", "bee", "Cat"), ("bee",), count=4)
    rgb = Image.open(root / "train" / "ant" / "0.jpg")
    forms = {"grey.JPEG": "L", "cmyk.jpg": "CMYK", "alpha.png": "RGBA", "palette.png": "P", "grey_alpha.PNG": "LA"}
    for split, name in (("train", "ant"), ("val", "bee")):
        below = root / split / name / "z" / "é"
        below.mkdir(parents=True)
        for file, mode in forms.items():
            rgb.convert(mode).save(below / file)
        (root / split / name / "link").symlink_to(below.parent)
        (root / split / name / "note.txt").write_text("no image")
    return root


@pytest.fixture
def small(tree, tmp_path: Path) -> Path:
    """Give a folder to spoil, of 4 images in train/ and 4 in val/."""
    return Path(shutil.copytree(tree(count=2), tmp_path / "data"))


def run(*argv: object) -> int:
    return folder2lmdb.main([str(a) for a in argv])


def complaint(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """Run a command that fails with one line, and give it."""
    assert run(*argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("folder2lmdb.py: error: ")
    assert not any(line.startswith("folder2lmdb.py") for line in said[:-1])
    return said[-1]


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_images_labels_classes_and_order_are_those_of_torchvision(mixed, tmp_path):
    assert run("--dir", mixed, "--out", tmp_path, "--workers", 3) == 0
    for split, count in (("train", 22), ("val", 14)):
        records, folder = ImageDatabase(tmp_path / f"{split}.lmdb"), ImageFolder(mixed / split)
        assert len(records) == len(records.paths) == len(folder) == count
        assert records.classes == ["Cat", "ant", "bee"] and records.named
        names = [folder.classes[label] for label in folder.targets]
        assert [records.classes[label] for label in records.labels] == names
        assert [str(mixed / split / path) for path in records.paths] == [path for path, _ in folder.samples]
        for i, (path, _) in enumerate(folder.samples):
            assert records[i] == (Path(path).read_bytes(), records.labels[i])
        with pytest.raises(ValueError, match="read-only"):
            records.labels[0] = 1
    assert class_folders.EXTENSIONS == IMG_EXTENSIONS


def test_samples_are_those_of_the_folders(mixed, tmp_path):
    assert run("--dir", mixed, "--out", tmp_path) == 0
    transform = datasets.build_transform(False, (32, 32))
    class_map = None
    for train in (True, False):
        common = (train, (32, 32), transform, class_map)
        folder = datasets.build_dataset("FOLDER", str(mixed), *common)
        database = datasets.build_dataset("FOLDER", str(tmp_path), *common, use_lmdb=True)
        class_map = {name: i for i, name in enumerate(folder.classes)}
        assert database.classes == folder.classes and list(database.targets) == folder.targets
        for (found, label), (expected, target) in zip(
            map(database.__getitem__, range(len(database))), folder, strict=True
        ):
            assert torch.equal(found, expected) and label == target and type(label) is int


def test_training_and_evaluating_from_databases_is_as_from_folders(tree, tiny_flags, tmp_path, capsys):
    root = tree(("ant", "bee", "cat"), ("ant", "bee"), count=6)
    assert run("--dir", root, "--out", tmp_path) == 0
    flags = [*tiny_flags, "--data-set", "IMNET", "--input-size", "32", "--batch-size", "6", "--aa", "rand-m9-mstd0.5"]
    said, states = [], []
    for name, where in (("folder", [str(root)]), ("lmdb", [str(tmp_path), "--use-lmdb"])):
        out = str(tmp_path / name)
        assert main.main([*flags, "--data-path", *where, "--output_dir", out]) == 0
        states.append(torch.load(tmp_path / name / "checkpoint.pth"))
        capsys.readouterr()
        evaluate = ["--eval", "--resume", str(tmp_path / "folder" / "checkpoint.pth")]
        assert main.main([*flags, "--data-path", *where, *evaluate]) == 0
        said.append([line for line in capsys.readouterr().out.splitlines() if "Acc@1" in line or "lacks" in line])
    assert said[0] == said[1] and any("lacks 1 of the 3 classes: cat" in line for line in said[0])
    assert states[0]["classes"] == states[1]["classes"]
    for name, weight in states[0]["model"].items():
        assert torch.equal(weight, states[1]["model"][name]), name


def test_a_split_built_alone_is_matched_by_the_names_of_its_classes(tree, tmp_path):
    root = tree(("ant", "bee", "cat"), ("bee", "cat"), count=1)
    run("--dir", root, "--out", tmp_path, "--split", "train")
    shutil.rmtree(root / "train")
    run("--dir", root, "--out", tmp_path)
    class_map = {name: i for i, name in enumerate(ImageDatabase(tmp_path / "train.lmdb").classes)}
    val = datasets.DatabaseImages(tmp_path / "val.lmdb", None, class_map)
    assert ImageDatabase(tmp_path / "val.lmdb").labels.tolist() == [0, 1]
    assert val.targets.tolist() == [1, 2] and [val[i][1] for i in range(2)] == [1, 2]
    with pytest.raises(InputError, match=r"val.lmdb: class bee is not among the 1 training classes \(cat\)"):
        datasets.DatabaseImages(tmp_path / "val.lmdb", None, {"cat": 0})
    with pytest.raises(InputError, match="names of classes, and the training classes numbers"):
        datasets.DatabaseImages(tmp_path / "val.lmdb", None, {str(i): i for i in range(11)})


def test_the_map_grows_from_any_size(small, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    for i in range(3):
        Image.fromarray(noise).save(small / "train" / "ant" / f"noise{i}.png")
    [job] = folder2lmdb.plan(small, ["train"], tmp_path)
    folder2lmdb.build(job, 1, map_size=1 << 16)
    records = ImageDatabase(job.target)
    assert len(records) == 7 and records.verify() == []
    assert os.path.getsize(job.target) < job.needed() < os.path.getsize(job.target) + (2 << 20)


def test_a_full_disk_is_noticed_before_anything_is_written(small, capsys, monkeypatch):
    monkeypatch.setattr(folder2lmdb.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    said = complaint(capsys, "--dir", small)
    assert "train.lmdb: needs " in said and "and 1,000 are free there" in said and "--out" in said
    assert sorted(p.name for p in small.iterdir()) == ["train", "val"]


def test_a_disk_that_fills_up_is_one_line(small, capsys):
    """/dev/shm and the like apart, the nearest thing to a full disk is a limit on the size of files."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(small / "train" / "ant" / "noise.png")
    code = (
        "import resource, signal, sys, folder2lmdb; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000)); sys.exit(folder2lmdb.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--dir", str(small)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(folder2lmdb.__file__).parent)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "train.lmdb: cannot be written" in done.stderr and "bytes are free there" in done.stderr
    assert sorted(p.name for p in small.iterdir()) == ["train", "val"]


def test_what_is_there_is_replaced_only_when_asked(small, capsys):
    assert run("--dir", small, "--split", "val") == 0
    before = (small / "val.lmdb").read_bytes()
    said = complaint(capsys, "--dir", small)  # and train.lmdb is not begun
    assert "val.lmdb: already there (a complete database of 4 images); add --overwrite" in said
    assert not (small / "train.lmdb").exists() and (small / "val.lmdb").read_bytes() == before
    (small / "val.lmdb").write_bytes(b"")
    assert "val.lmdb: already there (not an image database but an empty file)" in complaint(capsys, "--dir", small)
    (small / "val" / "bee" / "0.jpg").unlink()
    assert run("--dir", small, "--overwrite") == 0
    assert [len(ImageDatabase(small / f"{split}.lmdb")) for split in ("train", "val")] == [4, 3]
    assert hidden(small) == []


def test_verifying_finds_a_flipped_byte(small, capsys):
    assert run("--dir", small, "--verify") == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"{small}/train.lmdb: OK, 4 images",
        f"{small}/val.lmdb: OK, 4 images",
    ]
    path = small / "val.lmdb"
    whole, image = path.read_bytes(), (small / "val" / "bee" / "0.jpg").read_bytes()[100:]
    for old, new, bad in ((image, b"x" + image[1:], "image 2 (bee/0.jpg)"), (b"bee/0", b"bed/0", "its table")):
        (small / "copy").write_bytes(whole.replace(old, new))
        (small / "copy").replace(path)
        assert run("--dir", small, "--verify") == 2
        said = capsys.readouterr()
        assert said.out.splitlines() == [f"{small}/train.lmdb: OK, 4 images"]
        damaged, error = said.err.splitlines()
        assert damaged.startswith(f"{path}: {bad}") and damaged.endswith("is damaged")
        assert f"{path}: 1 of 4 damaged" in error and f"folder2lmdb.py --dir {small} --overwrite" in error
    assert run("--dir", path, "--verify") == 2
    assert run("--dir", small / "train.lmdb", "--verify") == 0


def spoil(root: Path) -> list[Path]:
    """Cut one photograph short, where only decoding it all shows it, and write text into another file."""
    cut, text = root / "train" / "ant" / "0.jpg", root / "train" / "bee" / "1.png"
    cut.write_bytes(cut.read_bytes()[:-200])
    text.write_text("not an image")
    return [cut, text]


def test_unreadable_images_stop_the_build_and_are_all_named(small, capsys):
    bad = spoil(small)
    assert run("--dir", small) == 2
    *named, error = capsys.readouterr().err.splitlines()
    assert [line.partition(": not a readable image")[0] for line in named] == [str(p) for p in bad]
    assert f"error: {small}/train: 2 unreadable images" in error and "--skip-corrupt" in error
    assert sorted(p.name for p in small.iterdir()) == ["train", "val"]


def test_unreadable_images_are_left_out_or_taken_unseen_when_asked(small, capsys):
    spoil(small)
    assert run("--dir", small, "--split", "train", "--skip-corrupt") == 0
    said = capsys.readouterr()
    assert "2 images of 2 classes, 2 unreadable ones left out" in said.out and said.err.count("not a readable") == 2
    assert list(ImageDatabase(small / "train.lmdb").paths) == ["ant/1.png", "bee/0.jpg"]
    assert run("--dir", small, "--split", "train", "--no-check", "--overwrite") == 0
    records = ImageDatabase(small / "train.lmdb")
    assert records[3] == (b"not an image", 1) and len(records) == 4
    images = datasets.DatabaseImages(small / "train.lmdb")
    with pytest.raises(InputError, match=r"train.lmdb, image 3 \(bee/1.png\): not a readable image"):
        images[3]


def test_a_published_database_is_converted_beside_itself_or_in_place(tmp_path, capsys):
    (tmp_path / "new").mkdir()
    shutil.copy(GOLDEN, tmp_path / "train.lmdb")
    old = ImageDatabase(GOLDEN)
    assert "already there (a published database of 40 images)" in complaint(capsys, "--dir", tmp_path)
    assert run("--dir", tmp_path, "--out", tmp_path / "new") == 0
    assert run("--dir", tmp_path / "train.lmdb", "--overwrite", "--verify") == 0
    for path in (tmp_path / "new" / "train.lmdb", tmp_path / "train.lmdb"):
        new = ImageDatabase(path)
        assert new.published is None and old.published is not None
        assert [new[i] for i in range(len(new))] == [old[i] for i in range(40)]
        assert new.classes == old.classes == list("0123456789") and not new.named and new.paths is None
    assert "already of this format" in complaint(capsys, "--dir", tmp_path, "--overwrite")
    with pytest.raises(InputError, match="label 9 is not among the 4 training classes"):
        datasets.DatabaseImages(tmp_path / "train.lmdb", class_to_idx={c: i for i, c in enumerate("abcd")})


def test_a_source_that_cannot_be_converted_stays_as_it_is(tmp_path, capsys):
    data = bytearray(GOLDEN.read_bytes())
    data[data.index(b"\x89PNG", 30000) + 60] ^= 255
    (tmp_path / "train.lmdb").write_bytes(data)
    assert "1 unreadable images" in complaint(capsys, "--dir", tmp_path, "--overwrite")
    assert (tmp_path / "train.lmdb").read_bytes() == data and hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "--dir"),
        ("--dir nowhere", "--dir nowhere: no such folder or file; name the folder that holds train/ and val/"),
        ("--dir data/train", "--dir data/train: neither train/ nor val/ in it"),
        ("--dir data --split test", "'test'"),
        ("--dir data --spilt train", "did you mean --split?"),
        ("--dir data --workers 0", "--workers 0: takes a number of at least 1"),
        ("--dir data --out nowhere", "--out nowhere: no such folder; make it first"),
        ("--dir data/train/ant/0.jpg", "data/train/ant/0.jpg: not an image database"),
        ("--dir data --out full", "full/val.lmdb: a folder is in the way"),
        ("--dir flat", "flat/val: no class folders in it; images belong into val/CLASS/"),
        ("--dir extra", "extra/val/cat: not among the 2 training classes (ant, bee); rename or remove it"),
        ("--dir empty", "empty/train/bee: no images in this class folder"),
        ("--dir data/train.lmdb --verify", "no such folder or file"),
    ],
)
def test_what_can_be_mended_is_one_line(small, tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full" / "val.lmdb").mkdir(parents=True)
    for name in ("flat", "extra", "empty"):
        shutil.copytree(small, tmp_path / name)
    shutil.rmtree(tmp_path / "flat" / "val")
    shutil.copytree(small / "val" / "ant", tmp_path / "flat" / "val")
    (tmp_path / "extra" / "val" / "ant").rename(tmp_path / "extra" / "val" / "cat")
    for path in (tmp_path / "empty" / "train" / "bee").iterdir():
        path.unlink()
    before = sorted(tmp_path.rglob("*"))
    assert said in complaint(capsys, *flags.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_does_not_wait_for_torch():
    code = "import sys, folder2lmdb; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(folder2lmdb.__file__).parent).returncode == 0


# stopped in the middle


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory) -> Path:
    """Give a train/ of 60 names of one photograph, which takes two seconds to check."""
    folder = tmp_path_factory.mktemp("source") / "train" / "flower"
    folder.mkdir(parents=True)
    Image.fromarray(load_sample_images().images[1]).resize((1800, 1200)).save(folder / "0.jpg", quality=95)
    for i in range(1, 60):
        os.link(folder / "0.jpg", folder / f"{i}.jpg")
    return folder.parent.parent


def start(source: Path, out: Path, *flags: str) -> subprocess.Popen:
    command = [*COMMAND, "--dir", str(source), "--out", str(out), "--workers", "1", *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)


def check_left(out: Path, number: int) -> bool:
    """Say whether the database was complete after all; it is, or is not there."""
    target, temporary = out / "train.lmdb", out / ".train.lmdb.tmp"
    if number != signal.SIGKILL:
        assert hidden(out) == []
    elif temporary.exists() and not target.exists():
        with pytest.raises(InputError, match="half-written|not an image database"):
            ImageDatabase(temporary)
    if target.exists():
        records = ImageDatabase(target)
        assert len(records) == 60 and records.verify() == []
    return target.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_build_leaves_nothing_that_opens(slow_source, tmp_path, number):
    process = start(slow_source, tmp_path)
    wait_for(tmp_path / ".train.lmdb.tmp", process)
    time.sleep(random.uniform(0, 1))
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if check_left(tmp_path, number):
        return  # it was faster than the signal
    if number == signal.SIGKILL:
        assert process.returncode == -number and hidden(tmp_path) == [".train.lmdb.tmp"]
        assert start(slow_source, tmp_path, "--no-check").wait(60) == 0
        assert check_left(tmp_path, 0)
    else:
        assert process.returncode == 130
        assert said == "folder2lmdb.py: stopped; no unfinished database is left\n"


def test_what_a_killed_build_had_written_is_not_taken_over(small, tmp_path):
    left = folder2lmdb.Writer(small / ".train.lmdb.tmp", ["wasp"], True, 1 << 20)
    for i in range(9):
        left.add(b"old" * 5000, 0, f"wasp/{i}.jpg")
    left.finish()
    left.close()
    assert run("--dir", small) == 0 and hidden(small) == []
    assert len(ImageDatabase(small / "train.lmdb")) == 4 and ImageDatabase(small / "train.lmdb").verify() == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_builds_stopped_at_any_moment_leave_nothing_that_opens(slow_source, tmp_path, number):
    for _ in range(20):
        process = start(slow_source, tmp_path)
        time.sleep(random.uniform(0, 3))
        process.send_signal(number)
        process.communicate(timeout=60)
        check_left(tmp_path, number)
        (tmp_path / "train.lmdb").unlink(missing_ok=True)
    assert start(slow_source, tmp_path, "--no-check").wait(60) == 0
    assert check_left(tmp_path, 0)


def test_a_second_build_of_the_same_database_is_refused(slow_source, tmp_path, capsys):
    first = start(slow_source, tmp_path)
    wait_for(tmp_path / ".train.lmdb.tmp", first)
    time.sleep(0.1)
    assert "train.lmdb: another build of it is running" in complaint(
        capsys, "--dir", slow_source, "--out", tmp_path, "--overwrite"
    )
    assert first.wait(60) == 0
    first.stderr.close()
    assert check_left(tmp_path, 0)


@pytest.mark.slow
def test_it_is_as_fast_as_decoding_or_copying(tmp_path):
    """2,000 photographs; the median of five ratios of neighbours in time, as other processes share the machine."""
    photographs = [Image.fromarray(p) for p in load_sample_images().images]
    rng, folder = random.Random(0), tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for i in range(2000):
        x, y = rng.randrange(80), rng.randrange(30)
        photograph = photographs[i % 2].crop((x, y, x + 560, y + 390))
        photograph.resize((500, 375)).save(folder / f"{i}.jpg", quality=92)
    files, cores = sorted(folder.iterdir()), len(os.sched_getaffinity(0))
    took = {"decode": [], "check": [], "cp": [], "no check": []}
    for _ in range(5):
        with ProcessPoolExecutor(cores) as pool:
            list(pool.map(decode, files[:cores]))
            start = time.perf_counter()
            list(pool.map(decode, files, chunksize=16))
            took["decode"].append(time.perf_counter() - start)
        for name, flags in (("check", ()), ("no check", ("--no-check",))):
            os.sync()
            start = time.perf_counter()
            assert run("--dir", tmp_path, "--overwrite", *flags) == 0
            took[name].append(time.perf_counter() - start)
        os.sync()
        start = time.perf_counter()
        subprocess.run(["cp", "-r", folder, tmp_path / "copy"], check=True)
        os.sync()
        took["cp"].append(time.perf_counter() - start)
        shutil.rmtree(tmp_path / "copy")
    print({name: f"{2000 / np.median(seconds):.0f} images/s" for name, seconds in took.items()})
    decoding = np.median(np.divide(took["decode"], took["check"]))
    copying = np.median(np.divide(took["cp"], took["no check"]))
    print(f"{decoding:.0%} of the speed of decoding, {copying:.0%} of that of copying")
    assert decoding >= 0.8 and copying >= 0.25


def decode(path: Path) -> None:
    Image.open(path).convert("RGB")
