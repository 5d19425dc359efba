"""Hold-outs, folds and fractions of the training images, against Python sets and counters of what is opened."""

import builtins
import csv
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from test_small_data import write_idx
from torch.utils.data import Dataset
from torchvision.datasets import FashionMNIST

import datasets
import folder2lmdb
import main
from data.images import ImageFiles
from util.config import AugmentConfig, DataConfig, ModelConfig
from util.errors import InputError

COUNTS = {"ant": 10, "bee": 15, "cow": 20}
CONFIG = ModelConfig("", input_size=(8, 8), crop_ratio=1.0)
FLAGS = (
    f"{SMALL} --data-set FOLDER --input-size 8 --batch-size 6 --epochs 1 --warmup-epochs 0 --no-repeated-aug --aa none"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a folder of 45 training images of which no two are equal, as folders, a database and iNaturalist's list.

    There is no validation split.
    """
    root = tmp_path_factory.mktemp("splits")
    rng = np.random.default_rng(0)
    images = []
    for k, (name, count) in enumerate(COUNTS.items()):
        folder = root / "all" / "insects" / str(k)
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            images.append({"file_name": f"all/insects/{k}/{i}.png"})
        shutil.copytree(folder, root / "train" / name)
    # neither by class nor by name
    rng.shuffle(images)
    content = {"images": images, "annotations": [{"category_id": k} for k in range(3)]}
    (root / "train2018.json").write_text(json.dumps(content))
    (root / "categories.json").write_text(json.dumps([{"name": name} for name in COUNTS]))
    (root / "val").mkdir()
    shutil.copytree(root / "train" / "ant", root / "val" / "ant")
    assert folder2lmdb.main(["--dir", str(root)]) == 0
    shutil.rmtree(root / "val")
    (root / "val.lmdb").unlink()
    return root


KINDS = {"FOLDER": ("FOLDER", False), "LMDB": ("FOLDER", True), "INAT": ("INAT", False), "DIGITS": ("DIGITS", False)}


def build(kind: str, root: Path, **split) -> tuple[Dataset, Dataset | None]:
    """Return the training images, not augmented, and what is held out of them."""
    name, lmdb = KINDS[kind]
    data = DataConfig(name, str(root), lmdb=lmdb, transform="timm", **split)
    train = datasets.build_train_set(data, CONFIG, AugmentConfig(aa="none"))
    return train, datasets.build_val_set(data, CONFIG) if data.holds_out else None


def image_set(dataset: Dataset) -> set[tuple[str, int]]:
    """Return the names and labels of images, which must all differ."""
    files = dataset.files or [f"image {i}" for i in range(len(dataset))]
    images = set(zip(files, dataset.targets, strict=True))
    assert len(images) == len(dataset) == len(set(files))
    return images


def check_stratified(part: set[tuple[str, int]], whole: set[tuple[str, int]]) -> None:
    """Check that each class has its share of a part, but for less than an image."""
    counts, all_counts = (Counter(label for _, label in images) for images in (part, whole))
    for label, count in all_counts.items():
        assert abs(counts[label] - count * len(part) / len(whole)) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_folds_are_disjoint_stratified_and_hold_out_each_image_once(kind, root):
    whole = image_set(build(kind, root)[0])
    held_out = Counter()
    for fold in range(4):
        train, val = map(image_set, build(kind, root, folds=4, fold=fold))
        assert train | val == whole and not train & val
        check_stratified(val, whole)
        held_out.update(val)
    assert held_out == Counter(whole)
    other = image_set(build(kind, root, folds=4, fold=3, split_seed=1)[1])
    assert other != val and len(other) == len(val)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hold_out_is_a_share_of_the_fraction_that_was_drawn_before(kind, root):
    whole = image_set(build(kind, root)[0])
    drawn = image_set(build(kind, root, train_fraction=0.6, split_seed=3)[0])
    assert len(drawn) == -(-len(whole) * 6 // 10) and drawn < whole
    check_stratified(drawn, whole)
    train, val = map(image_set, build(kind, root, train_fraction=0.6, val_fraction=0.25, split_seed=3))
    assert train | val == drawn and not train & val
    assert len(val) == -(-len(drawn) // 4)
    check_stratified(val, drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_images_are_prepared_for_evaluation_and_come_with_their_labels(kind, root):
    _, val = build(kind, root, val_fraction=0.25)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CONFIG.mean, CONFIG.std))
    digits = datasets.load_digits(True, (8, 8), None)
    folders = {**{name: k for k, name in enumerate(COUNTS)}, "0": 0, "1": 1, "2": 2}
    for (image, label), file in zip(val, val.files, strict=True):
        if kind == "DIGITS":
            pixels, expected = digits[int(file.removeprefix("image "))]
        else:
            # a database's files are below the split
            pixels, expected = Image.open(root / "train" / file), folders[Path(file).parent.name]
        assert label == expected
        pixels = torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255  # 3, 8, 8
        torch.testing.assert_close(image, (pixels - mean) / std)


def record(words: list[str]) -> int:
    """Be one process of a run that writes down which images it opens with gradients, to train, and which without."""
    opened = {True: [], False: []}
    original = builtins.open

    def wrapped(file, *args, **kwargs):
        if str(file).endswith(".png"):
            opened[torch.is_grad_enabled()].append(str(file))
        return original(file, *args, **kwargs)

    out, *flags = words
    builtins.open = wrapped
    try:
        return main.main(flags)
    finally:
        builtins.open = original
        text = json.dumps([opened[True], opened[False]])
        Path(f"{out}.{os.environ.get('RANK', 0)}.json").write_text(text)


def read_record(out: Path, ranks: int = 1) -> tuple[Counter, Counter]:
    """Return the images that all processes together opened to train, and those to evaluate."""
    shares = [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(ranks)]
    train, val = (Counter(file for share in shares for file in share[i]) for i in (0, 1))
    return train, val


def test_any_number_of_processes_and_a_resumed_run_hold_out_the_same_and_open_no_test_images(runner, root, tmp_path):
    """The data has no validation split at all."""
    flags = f"{FLAGS} --no-model-ema --folds 5 --fold 2 --data-path {root} --output_dir {tmp_path}/run --resume auto"
    seen = []
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        # an epoch more each time
        words = [str(out), *flags.split(), "--epochs", str(ranks)]
        result = runner(words, out, ranks, call="test_splits:record")
        assert result["status"] == [0] * ranks, result["err"]
        seen.append(read_record(out, ranks))
    # 36 images in whole batches for 1, 2 and 3 processes
    train, val = seen[0]
    assert all(counters == seen[0] for counters in seen)
    assert set(train.values()) == set(val.values()) == {1} and not train.keys() & val.keys()
    assert train.keys() | val.keys() == {str(path) for path in (root / "train").rglob("*.png")}
    assert Counter(Path(file).parent.name for file in val) == {"ant": 2, "bee": 3, "cow": 4}


def test_evaluation_reproduces_the_hold_outs_accuracy_and_split_test_evaluates_the_other(root, tmp_path, capfd):
    data = tmp_path / "data"
    shutil.copytree(root / "train", data / "train")
    flags = [*FLAGS.split(), "--data-path", str(data), "--val-fraction", "0.2", "--output_dir", str(tmp_path / "out")]
    assert record([str(tmp_path / "seen"), *flags, "--no-model-ema"]) == 0
    _, val = read_record(tmp_path / "seen")
    line = json.loads((tmp_path / "out" / "log.txt").read_text())
    # the run names the command, which needs no test split
    (command,) = re.findall(r"python main.py (--eval --resume \S+) \(.*--split test", capfd.readouterr().out)

    def evaluate(command: str) -> tuple[str, set[str]]:
        words = f"{command} --report {tmp_path}/report --device cpu --num_workers 0"
        assert main.main(words.split()) == 0
        with open(tmp_path / "report" / "predictions.csv") as file:
            return capfd.readouterr().out, {row["file"] for row in csv.DictReader(file)}

    out, files = evaluate(command)
    assert f"Acc@1 {line['test_acc1']:.3f}" in out and f"loss {line['test_loss']:.3f}" in out
    assert files == set(val) and "0.2 of the training split" in out
    # another image would shift the others
    new = data / "train" / "ant" / "new.png"
    shutil.copy(data / "train" / "ant" / "0.png", new)
    for words in (command, f"{' '.join(flags)} --resume auto --epochs 2"):
        assert main.main(f"{words} --device cpu --num_workers 0".split()) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and "has 46 images, and had 45" in error and "--split test" in error
    new.unlink()
    # only now is there a test set
    shutil.copytree(data / "train" / "bee", data / "val" / "bee")
    out, files = evaluate(f"{command} --split test")
    assert files == {str(path) for path in (data / "val").rglob("*.png")} and "own split" in out


def test_a_database_trains_and_evaluates_on_a_fold(root, tmp_path, capfd):
    flags = f"{FLAGS} --use-lmdb --folds 3 --fold 1 --data-path {root} --output_dir {tmp_path}"
    assert main.main(flags.split()) == 0
    loss = json.loads((tmp_path / "log.txt").read_text())["test_loss"]
    capfd.readouterr()
    evaluate = f"--eval --resume {tmp_path}/checkpoint.pth --device cpu --num_workers 0"
    assert main.main(evaluate.split()) == 0
    out = capfd.readouterr().out
    assert f"loss {loss:.3f}" in out and "fold 1 of 3" in out and "on the 15 test images" in out


def test_torchvision_opens_the_training_split_alone_until_split_test(tmp_path, monkeypatch):
    write_idx(tmp_path / "FashionMNIST" / "raw")
    opened = []
    original = FashionMNIST.__init__

    def wrapped(self, root, train, **kwargs) -> None:
        opened.append(train)
        original(self, root, train, **kwargs)

    monkeypatch.setattr(FashionMNIST, "__init__", wrapped)
    flags = f"{FLAGS} --data-set FASHION --input-size 28 --batch-size 4 --data-path {tmp_path} --output_dir {tmp_path}"
    assert main.main([*flags.split(), "--val-fraction", "0.25"]) == 0
    evaluate = f"--resume {tmp_path}/checkpoint.pth --output_dir {tmp_path} --device cpu"
    assert main.main(f"--eval {evaluate}".split()) == 0
    assert main.main(f"--visualize attention --n_visualization 1 {evaluate}".split()) == 0
    assert opened and all(opened)
    opened.clear()
    assert main.main(f"--visualize attention --n_visualization 1 --split test {evaluate}".split()) == 0
    assert opened == [False]


def test_a_hold_out_is_the_runs_own_and_no_matter_of_fine_tuning(root, tmp_path):
    flags = f"{FLAGS} --data-path {root} --val-fraction 0.2"
    assert main.main(f"{flags} --output_dir {tmp_path}/first".split()) == 0
    more = (
        f"--finetune {tmp_path}/first/checkpoint.pth --val-fraction 0.4 --split-seed 7 --output_dir {tmp_path}/second"
    )
    assert main.main(f"{flags} {more}".split()) == 0
    saved = torch.load(tmp_path / "second" / "checkpoint.pth")["data"]
    assert (saved["val_fraction"], saved["split_seed"]) == (0.4, 7)


@pytest.mark.parametrize(
    ("split", "smallest"),
    [
        # the smallest class that each can split, and one image less
        ({"val_fraction": 0.1}, 10),
        ({"val_fraction": 0.9}, 10),
        ({"train_fraction": 0.25}, 4),
        ({"folds": 7}, 7),
    ],
)
def test_a_class_that_would_be_empty_is_named(split, smallest, monkeypatch):
    def build(count: int) -> tuple[Dataset, Dataset]:
        targets = [0] * 30 + [2] * count + [3] * 41
        images = ImageFiles([str(i) for i in range(len(targets))], targets, ["ant", "bee", "cow", "dog"], None)
        monkeypatch.setattr(datasets, "build_dataset", lambda *args: images)
        data = DataConfig("FOLDER", **split)
        train = datasets.build_train_set(data, CONFIG, AugmentConfig())
        return train, datasets.build_val_set(data, CONFIG) if data.holds_out else train

    # the second class never had any
    for part in build(smallest):
        assert set(part.targets) == {0, 2, 3}
    with pytest.raises(InputError, match=f"class cow has {smallest - 1} .* needs {smallest} "):
        build(smallest - 1)
