"""prepare.py on data sets made by hand, in the layouts in which they are published."""

import csv
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import main
import prepare

TRAIN = """clipart/ant/clipart_001_000001.jpg 0
clipart/ant/a second one.jpg 0
clipart/The Eiffel Tower/clipart_300_000001.jpg 1
"""
TEST = "clipart/The Eiffel Tower/clipart_300_000002.jpg 1\nclipart/ant/clipart_001_000002.jpg 0\n"


@pytest.fixture
def root(tmp_path) -> Path:
    """Return a folder with an unpacked archive of five images in two classes, and its lists."""
    folder = tmp_path / "downloads"
    for line in (TRAIN + TEST).splitlines():
        file = folder / line[: line.rindex(" ")]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(line)
    (folder / "clipart_train.txt").write_text(TRAIN)
    (folder / "clipart_test.txt").write_text(TEST)
    return folder


def call(root: Path, out: Path) -> int:
    return prepare.main(["domainnet", str(root), "--set", "clipart", "--out", str(out)])


def test_lists_become_class_folders_of_links(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = Path("new/clipart")
    assert call(Path("downloads"), out) == 0
    for split, text in (("train", TRAIN), ("val", TEST)):
        samples = ImageFolder(out / split, is_valid_file=lambda _: True).samples
        assert sorted(Path(path).read_text() for path, _ in samples) == sorted(text.splitlines())
        for path, _ in samples:
            line = Path(path).read_text()
            assert Path(path).samefile(root / line[: line.rindex(" ")])
            assert Path(path).parent.name == line.split("/")[1]
    # the paper's numbers, of which these five images fall short
    text = capsys.readouterr().out
    assert "3 training and 2 validation images of 2 classes" in text and "Warning" in text
    assert all(number in text for number in ("33525", "14604", "345"))


def test_the_papers_numbers_pass_without_a_warning(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(prepare.SIZES, "clipart", (3, 2, 2))
    assert call(root, tmp_path / "out") == 0
    assert "Warning" not in capsys.readouterr().out
    cleaned = {"clipart": 48129, "infograph": 51605, "painting": 72266, "quickdraw": 172500, "real": 172947}
    for name, total in (cleaned | {"sketch": 69128}).items():  # as the authors of DomainNet state them
        assert name == "clipart" or sum(prepare.SIZES[name][:2]) == total


def test_sizes_are_those_of_the_papers_table():
    text = (Path(prepare.__file__).parent / "docs" / "paper.md").read_text()
    rows = re.findall(r"^\| (\w+) \|.*_train\.txt\), ([\d,]+) \|.*_test\.txt\), ([\d,]+) \|$", text, re.M)
    # all of DomainNet's classes
    expected = {name: (*(int(count.replace(",", "")) for count in counts), 345) for name, *counts in rows}
    assert len(rows) == 6 and prepare.SIZES == expected


BAD = {
    "missing file": (TRAIN + "clipart/ant/none.jpg 0\n", "line 4", "none.jpg is missing", "unpack"),
    "second label": (TRAIN + "clipart/ant/a second one.jpg 1\n", "line 4", "ant"),
    "second class": (TRAIN.replace("jpg 1", "jpg 0"), "line 3", "The Eiffel Tower"),
    "no label": (TRAIN.replace(".jpg 1", ".jpg"), "line 3", "SPLIT/CLASS/FILE"),
    "another list": ("ant.jpg 0\n", "line 1", "SPLIT/CLASS/FILE"),
}


@pytest.mark.parametrize("row", BAD)
def test_a_wrong_list_is_one_line_and_makes_nothing(root, tmp_path, capsys, row):
    text, *parts = BAD[row]
    (root / "clipart_train.txt").write_text(text)
    assert call(root, tmp_path / "out") == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("prepare.py: error: ") and all(part in error for part in ["clipart_train.txt", *parts])
    assert not (tmp_path / "out").exists()


def test_labels_agree_between_the_lists(root, tmp_path, capsys):
    (root / "clipart_test.txt").write_text(TEST.replace("jpg 1", "jpg 2"))
    assert call(root, tmp_path / "out") == 2
    assert "clipart_test.txt, line 1: clipart/The Eiffel Tower" in capsys.readouterr().err


def test_a_missing_list_and_an_existing_folder_are_one_line(root, tmp_path, capsys):
    assert call(root, root) == 2 and "exists already" in capsys.readouterr().err
    (root / "clipart_test.txt").unlink()
    assert call(root, tmp_path / "out") == 2
    assert "clipart_test.txt" in capsys.readouterr().err


RNG = np.random.default_rng(0)
# split, class, and pixels
Images = Iterator[tuple[str, str, bytes]]


def make_pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(make_pixels(20, 24, 3)).save(path)


def load_pixels(path: Path) -> bytes:
    return np.array(Image.open(path)).tobytes()


def write_tiny_imagenet(root: Path) -> Path:
    folder = root / "tiny-imagenet-200"
    for name in ("n02124075", "n01443537"):
        for i in range(3):
            save_image(folder / f"train/{name}/images/{name}_{i}.JPEG")
        (folder / f"train/{name}/{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t19\t19\n")
    for i in range(3):
        save_image(folder / f"val/images/val_{i}.JPEG")
        save_image(folder / f"test/images/test_{i}.JPEG")
    lines = [f"val_{i}.JPEG\t{name}\t0\t32\t44\t62\n" for i, name in enumerate(("n02124075", "n01443537", "n02124075"))]
    (folder / "val/val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("n02124075\nn01443537\n")
    return folder


def read_tiny_imagenet(folder: Path) -> Images:
    for path in folder.glob("train/n*/images/*"):
        yield "train", path.name.split("_")[0], load_pixels(path)
    with open(folder / "val/val_annotations.txt") as file:
        for row in csv.reader(file, delimiter="\t"):
            yield "val", row[1], load_pixels(folder / "val/images" / row[0])


def write_chaoyang(root: Path) -> Path:
    for split, labels in (("train", (0, 3, 1, 1, 0)), ("test", (1, 3))):
        entries = [{"name": f"{split}/5354{i}-IMG-0.JPG", "label": label} for i, label in enumerate(labels)]
        for entry in entries:
            save_image(root / "chaoyang" / entry["name"])
        (root / "chaoyang" / f"{split}.json").write_text(json.dumps(entries))
    return root / "chaoyang"


def read_chaoyang(folder: Path) -> Images:
    for split, name in (("train", "train.json"), ("val", "test.json")):
        for entry in json.loads((folder / name).read_text()):
            yield split, str(entry["label"]), load_pixels(folder / entry["name"])


def write_medmnist(root: Path, colours: tuple[int, ...] = (3,), **more: np.ndarray) -> Path:
    """Write an .npz with labels from 0 to 10; `more` replaces arrays, or leaves out those that are None."""
    arrays = {}
    for split, labels in (("train", [0, 10, 2, 2, 0]), ("val", [10, 0]), ("test", [2])):
        arrays[f"{split}_images"] = make_pixels(len(labels), 28, 28, *colours)
        arrays[f"{split}_labels"] = np.array(labels, np.uint8)[:, None]
    arrays = {name: array for name, array in (arrays | more).items() if array is not None}
    np.savez_compressed(root / "bloodmnist.npz", **arrays)
    return root / "bloodmnist.npz"


def read_medmnist(path: Path) -> Images:
    arrays = np.load(path)
    for split in ("train", "val", "test"):
        for pixels, (label,) in zip(arrays[f"{split}_images"], arrays[f"{split}_labels"], strict=True):
            yield split, ("00", "", "02", *[""] * 7, "10")[label], pixels.tobytes()


ROWS = """\ufeffpath, label, split
patient1/1.png, cat, train
patient2/1.png, cat, train
patient2/1.png, cat, train
"patient3/one, two.jpg", The Eiffel Tower, train
patient3/3.png, The Eiffel Tower, train
patient1/2.png, cat, val
patient1/3.png, cat, extra
"""


def write_csv(root: Path, text: str = ROWS) -> Path:
    for name in ("patient1/1.png", "patient2/1.png", "patient3/one, two.jpg", "patient1/2.png", "patient1/3.png"):
        save_image(root / name)
    save_image(root / "patient3/3.png")
    (root / "images.csv").write_text(text, encoding="utf-8")
    return root / "images.csv"


def read_csv(path: Path) -> Images:
    # a line that comes twice counts once
    for file, label, split in set(map(tuple, csv.reader(path.read_text().splitlines()[1:], skipinitialspace=True))):
        yield split, label, load_pixels(path.parent / file)


WRITE: dict[str, Callable[[Path], Path]] = {
    "tiny-imagenet": write_tiny_imagenet,
    "chaoyang": write_chaoyang,
    "medmnist": write_medmnist,
    "csv": write_csv,
}
READ = {"tiny-imagenet": read_tiny_imagenet, "chaoyang": read_chaoyang, "medmnist": read_medmnist, "csv": read_csv}


def lay_out(name: str, source: Path, out: Path) -> int:
    return prepare.main([name, str(source), "--out", str(out)])


def walk(out: Path) -> Images:
    for folder, _, files in os.walk(out):
        for file in files:
            yield *Path(folder).relative_to(out).parts, load_pixels(Path(folder, file))


@pytest.mark.parametrize("name", WRITE)
def test_class_folders_have_the_images_and_labels_of_the_lists(name, tmp_path, capsys):
    source = WRITE[name](tmp_path)
    out = tmp_path / "new" / "out"
    assert lay_out(name, source, out) == 0
    expected = Counter(READ[name](source))
    assert Counter(walk(out)) == expected
    # links, except for what had no file
    assert {path.is_symlink() for path in out.glob("*/*/*")} == {name != "medmnist"}
    splits = Counter(split for split, _, _ in expected.elements())
    assert f"{splits['train']} training and {splits['val']} validation images" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_grey_images_of_an_npz_stay_grey(tmp_path):
    source = write_medmnist(tmp_path, colours=())
    assert lay_out("medmnist", source, tmp_path / "out") == 0
    assert Counter(walk(tmp_path / "out")) == Counter(read_medmnist(source))


def test_spaces_and_capitals_in_a_csv_change_nothing(tmp_path):
    source = write_csv(tmp_path, "Path ,LABEL, Split \npatient1/1.png,cat ,train \npatient2/1.png,cat,val\n")
    assert lay_out("csv", source, tmp_path / "out") == 0
    assert sorted((split, name) for split, name, _ in walk(tmp_path / "out")) == [("train", "cat"), ("val", "cat")]


def test_without_a_column_split_all_images_are_for_training(tmp_path):
    source = write_csv(tmp_path, "label,path\ncat,patient1/1.png\ndog,patient2/1.png\n")
    assert lay_out("csv", source, tmp_path / "out") == 0
    files = {("train", "cat"): "patient1/1.png", ("train", "dog"): "patient2/1.png"}
    expected = {(*place, load_pixels(source.parent / file)) for place, file in files.items()}
    assert set(walk(tmp_path / "out")) == expected


@pytest.mark.parametrize("name", WRITE)
def test_main_trains_and_evaluates_on_the_folders(name, tmp_path, tiny_flags, capfd):
    source = WRITE[name](tmp_path)
    assert lay_out(name, source, tmp_path / "data") == 0
    data = ["--data-set", "FOLDER", "--data-path", str(tmp_path / "data")]
    saved = tmp_path / "out" / "checkpoint.pth"
    flags = [*tiny_flags, *data, "--batch-size", "2", "--output_dir", str(saved.parent)]
    assert main.main(flags) == 0
    assert torch.load(saved)["classes"] == sorted({class_name for _, class_name, _ in READ[name](source)})
    # the test images of MedMNIST, and a split of the CSV's own
    split = {"medmnist": "test", "csv": "extra"}.get(name, "val")
    evaluate = ["--eval", "--resume", str(saved), "--val-split", split, "--device", "cpu", "--num_workers", "0"]
    assert main.main([*evaluate, *data]) == 0


def replace(file: str, old: str, new: str) -> Callable[[Path], None]:
    """Return a fault: `old` is `new` in a file of the folder, or in the CSV."""

    def spoil(source: Path) -> None:
        path = source / file if source.is_dir() else source
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return spoil


def remove(file: str) -> Callable[[Path], None]:
    return lambda source: (source / file if source.is_dir() else source.parent / file).unlink()


def arrays(**more: np.ndarray | None) -> Callable[[Path], Path]:
    return lambda source: write_medmnist(source.parent, **more)


def save_npy(source: Path) -> None:
    with open(source, "wb") as file:
        np.save(file, make_pixels(3, 28, 28))


def list_another_file(source: Path) -> None:
    """List a file whose name patient2/1.png gets in its class folder."""
    save_image(source.parent / "patient2_1.png")
    replace("", "patient1/1.png", "patient2_1.png")(source)


LIST = "val/val_annotations.txt"
# the data set, what is wrong with it, and what the line names
FAULTS: dict[str, tuple] = {
    "no folder": ("tiny-imagenet", shutil.rmtree, "val_annotations.txt"),
    "no list": ("tiny-imagenet", remove(LIST), "val_annotations.txt"),
    "no training images": ("tiny-imagenet", lambda source: shutil.rmtree(source / "train"), "n0", "train"),
    "no validation image": ("tiny-imagenet", remove("val/images/val_1.JPEG"), "val_1.JPEG", "missing", "unpack"),
    "spaces for tabs": ("tiny-imagenet", replace(LIST, "\tn02124075\t0\t32\t44\t62", " n02124075"), LIST, "tabs"),
    "class only in val": ("tiny-imagenet", replace(LIST, "n01443537", "n01443538"), "n01443538", "train"),
    "no JSON list": ("chaoyang", remove("test.json"), "test.json", "download"),
    "broken JSON": ("chaoyang", replace("test.json", "]", ""), "test.json", '{"name": FILE, "label": CLASS}'),
    "no label in JSON": ("chaoyang", replace("train.json", '"label"', '"class"'), "train.json", "'label'"),
    "JSON of another layout": ("chaoyang", lambda source: (source / "train.json").write_text('{"a": 1}'), "train.json"),
    "no image of JSON": ("chaoyang", remove("train/53542-IMG-0.JPG"), "53542-IMG-0.JPG", "missing", "unpack"),
    "no npz": ("medmnist", remove("bloodmnist.npz"), "bloodmnist.npz", "download"),
    "npz without labels": ("medmnist", arrays(val_labels=None), "bloodmnist.npz", "val_labels"),
    "text as npz": ("medmnist", lambda source: source.write_text("{}"), "bloodmnist.npz", ".npz of MedMNIST"),
    "nothing as npz": ("medmnist", lambda source: source.write_text(""), "bloodmnist.npz", ".npz of MedMNIST"),
    "npy": ("medmnist", save_npy, "bloodmnist.npz", ".npz of MedMNIST"),
    "cut npz": ("medmnist", lambda source: source.write_bytes(source.read_bytes()[:2000]), "bloodmnist.npz"),
    "too few labels": ("medmnist", arrays(test_labels=np.zeros((0, 1), np.uint8)), "test_labels", "(0, 1)", "1 images"),
    "many labels": ("medmnist", arrays(val_labels=make_pixels(2, 14)), "val_labels", "(2, 14)", "one label for each"),
    "volumes": ("medmnist", arrays(train_images=make_pixels(5, 28, 28, 28)), "bloodmnist.npz", "2D images"),
    "no CSV": ("csv", remove("images.csv"), "images.csv", "path, label"),
    "no column label": ("csv", replace("", "label", "class"), "images.csv", "'label'", "path, label"),
    "semicolons": ("csv", lambda source: source.write_text(ROWS.replace(",", ";")), "images.csv", "path, label"),
    "no image of CSV": ("csv", remove("patient3/3.png"), "images.csv, line 6", "patient3/3.png", "missing"),
    "another encoding": ("csv", lambda source: source.write_bytes("path,label\né,é\n".encode("latin-1")), "images.csv"),
    "no class name": ("csv", replace("", "1.png, cat", "1.png, "), "images.csv, line 2", "SPLIT/CLASS/FILE"),
    "short line": ("csv", replace("", "patient1/2.png, cat, val", "patient1/2.png"), "line 7", "SPLIT/CLASS/FILE"),
    "class name of a path": ("csv", replace("", "cat", "pets/cat"), "images.csv, line 2", "pets/cat", "without /"),
    "class name above": ("csv", replace("", "cat", ".."), "images.csv, line 2", "SPLIT/CLASS/FILE"),
    "split of a path": ("csv", replace("", "train", "a/b"), "images.csv, line 2", "SPLIT/CLASS/FILE"),
    "no split train": ("csv", lambda source: source.write_text(ROWS.replace("train", "learn")), "train"),
    "unquoted comma": ("csv", replace("", "1.png, cat", "1.png, cat, wild"), "images.csv, line 2", "quote fields"),
    "one quote": ("csv", replace("", "cat", '"cat'), "images.csv", "path, label"),
    "line break": ("csv", replace("", "cat", '"c\nat"'), "images.csv, line 3", "line break"),
    "null byte": ("csv", replace("", "cat", "c\0at"), "images.csv, line 2", "quote fields"),
    "two labels": ("csv", replace("", "patient3/3.png", "patient1/1.png"), "line 6", "train/cat/patient1_1.png"),
    "two splits": ("csv", replace("", "patient1/2.png", "patient1/1.png"), "line 7", "train/cat/patient1_1.png"),
    "floats": ("medmnist", arrays(val_images=make_pixels(2, 28, 28) / 255), "val_images", "not uint8"),
    "one name twice": ("csv", list_another_file, "images.csv, line", "patient2_1.png", "rename"),
}


@pytest.mark.parametrize("row", FAULTS)
def test_a_fault_is_one_line_and_leaves_nothing(row, tmp_path, capsys):
    name, spoil, *parts = FAULTS[row]
    source = WRITE[name](tmp_path)
    spoil(source)
    before = sorted(tmp_path.rglob("*"))
    assert lay_out(name, source, tmp_path / "out") == 2
    (error,) = capsys.readouterr().err.splitlines()
    print(error)
    assert error.startswith("prepare.py: error: ") and all(part in error for part in parts)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["medmnist", "csv"])
def test_an_interrupted_run_leaves_nothing(name, tmp_path, monkeypatch, capsys):
    source = WRITE[name](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    calls = []

    def fill_disk(real: Callable) -> Callable:
        def write(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return write

    monkeypatch.setattr(os, "symlink", fill_disk(os.symlink))
    monkeypatch.setattr(Image.Image, "save", fill_disk(Image.Image.save))
    assert lay_out(name, source, tmp_path / "out") == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
