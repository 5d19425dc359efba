"""--eval --report FOLDER against scikit-learn and plain loops, on predictions that are collected without main.py."""

import csv
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from conftest import SMALL
from matplotlib.axes import Axes
from PIL import Image
from sklearn import metrics

import folder2lmdb
import main
import predict
from util import report

CLASSES = ["ant", "bee", "cow$", "dog", "4"]  # dog has no validation images, and the fifth output no name
FLAGS = [*SMALL.split(), *"--eval --data-set FOLDER --input-size 32 --nb-classes 5 --batch-size 2".split()]


class Plain(NamedTuple):
    """A checkpoint, its data, and what a plain loop finds: files, targets, predictions and probabilities."""

    flags: list[str]
    root: Path
    files: list[str]
    targets: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray


@pytest.fixture(scope="module")
def plain(tree, tmp_path_factory) -> Plain:
    root = tree(train=CLASSES[:4], val=CLASSES[:3], count=7, side=32)
    # images of the model's size, so that they are neither resized nor cropped
    for path in (root / "val").rglob("*.*"):
        Image.open(path).crop((0, 0, 32, 32)).save(path.with_suffix(".bmp"))
        path.unlink()
    files = sorted((root / "val").rglob("*.bmp"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]) / 255  # 21, 32, 32, 3
    images = (pixels - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])

    torch.manual_seed(1)
    model = timm.create_model("dhvt_tiny_cifar_patch4", num_classes=5, depth=1, embed_dim=32, num_heads=2).eval()
    with torch.no_grad():
        # a head whose answers differ from image to image
        logits = model(images.permute(0, 3, 1, 2))
        model.head.weight /= logits.std(dim=0)[:, None]
        model.head.bias.copy_(-logits.mean(dim=0) / logits.std(dim=0))
        logits = torch.cat([model(image.permute(2, 0, 1)[None]) for image in images])
    probabilities = logits.double().softmax(dim=1).numpy()
    checkpoint = tmp_path_factory.mktemp("report") / "c.pth"
    torch.save(model.state_dict(), checkpoint)
    targets = np.array([CLASSES.index(file.parent.name) for file in files])
    flags = [*FLAGS, "--eval-crop-ratio", "1", "--resume", str(checkpoint), "--data-path", str(root)]
    found = Plain(flags, root, list(map(str, files)), targets, probabilities.argmax(axis=1), probabilities)
    # some are right and some wrong, and some have a class without images
    assert 3 < (found.predicted == targets).sum() < 18 and len(set(found.predicted) - {0, 1, 2}) > 0
    return found


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def hand_made_ece(confidence: list[float], correct: list[bool]) -> float:
    total = 0.0
    for b in range(15):
        inside = [i for i, c in enumerate(confidence) if b / 15 < c <= (b + 1) / 15]
        if inside:
            accuracy = sum(bool(correct[i]) for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - sum(confidence[i] for i in inside) / len(inside))
    return total


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_report_is_that_of_scikit_learn_for_any_number_of_processes(runner, plain, tmp_path, ranks):
    """Two shares of 21 images are of unequal size; one class has no images, and one output no name."""
    targets, predicted, probabilities = plain.targets, plain.predicted, plain.probabilities
    folder = tmp_path / "new" / "report"
    result = runner([*plain.flags, "--report", str(folder)], tmp_path, ranks)
    assert result["status"] == [0] * ranks and result["err"] == [""] * ranks, result["err"]
    assert result["out"][1:] == [""] * (ranks - 1)

    scalars = json.loads((folder / "report.json").read_text())
    assert scalars == pytest.approx(
        {
            "images": 21,
            "classes": 5,
            "classes_without_images": 2,
            "accuracy": metrics.accuracy_score(targets, predicted),
            "balanced_accuracy": metrics.balanced_accuracy_score(targets, predicted),
            "macro_f1": metrics.f1_score(targets, predicted, average="macro"),
            "log_loss": metrics.log_loss(targets, probabilities, labels=range(5)),
            "calibration_error": hand_made_ece(probabilities.max(axis=1), predicted == targets),
        },
        abs=1e-5,
    )
    # what an evaluation prints is the same, but for rounding
    printed = re.search(r"Acc@1 ([\d.]+) .*loss ([\d.]+)", result["out"][0])
    assert float(printed[1]) == pytest.approx(100 * scalars["accuracy"], abs=6e-4)
    assert float(printed[2]) == pytest.approx(scalars["log_loss"], abs=6e-4)

    rows = read(folder / "predictions.csv")
    assert list(rows[0]) == ["file", "label", "prediction", *CLASSES]
    assert [row["file"] for row in rows] == plain.files
    assert [row["label"] for row in rows] == [Path(file).parent.name for file in plain.files]
    assert [row["prediction"] for row in rows] == [CLASSES[k] for k in predicted]
    assert [[float(row[name]) for name in CLASSES] for row in rows] == [
        pytest.approx(p, abs=1e-5) for p in probabilities
    ]

    counts = {label: dict.fromkeys(CLASSES, 0) for label in CLASSES}
    for row in rows:
        counts[row["label"]][row["prediction"]] += 1
    for row in read(folder / "confusion.csv"):
        assert counts.pop(row["label"]) == {name: int(row[name]) for name in CLASSES}
    assert not counts

    for k, row in enumerate(read(folder / "classes.csv")):
        hits = sum((targets == k) & (predicted == k))
        images, chosen = sum(targets == k), sum(predicted == k)
        assert row["class"] == CLASSES[k] and int(row["images"]) == images
        for name, size in (("accuracy", images), ("precision", chosen), ("f1", (images + chosen) / 2)):
            expected = hits / size if size else math.nan
            assert float(row[name]) == pytest.approx(expected, nan_ok=True), (CLASSES[k], name)
    for name in ("confusion.png", "mistakes.png"):
        assert Image.open(folder / name).format == "PNG"


@pytest.mark.parametrize("flags", [[], ["--transform", "timm"], ["--use-lmdb"]])
def test_the_sheet_shows_the_most_confident_mistakes_first(plain, tmp_path, monkeypatch, flags):
    """Each with its name and its pixels, also where images are normalized as they are loaded, and from a database."""
    root = shutil.copytree(plain.root, tmp_path / "data")
    if "--use-lmdb" in flags:
        assert folder2lmdb.main(["--dir", str(root)]) == 0
    shown = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **_: shown.append((text, axes.images[0].get_array())))
    words = [*plain.flags, "--data-path", str(root), "--report", str(tmp_path / "report"), *flags]
    assert main.main(words) == 0
    confidence = plain.probabilities.max(axis=1)
    wrong = [i for i in range(21) if plain.predicted[i] != plain.targets[i]]
    wrong.sort(key=lambda i: -confidence[i])
    for i, (text, pixels) in zip(wrong, shown, strict=True):
        file, label, prediction = text.split("\n")
        assert file == Path(plain.files[i]).name and CLASSES[plain.targets[i]] in label
        assert CLASSES[plain.predicted[i]] in prediction and f"{confidence[i]:.2%}" in prediction
        assert np.array_equal(pixels, np.array(Image.open(plain.files[i])))
    names = [Path(row["file"]).name for row in read(tmp_path / "report" / "predictions.csv")]
    assert names == [Path(file).name for file in plain.files]


def test_without_mistakes_there_is_no_sheet_and_an_earlier_one_goes(plain, tmp_path, capsys):
    root = shutil.copytree(plain.root, tmp_path / "data")
    for i in np.flatnonzero(plain.predicted != plain.targets):
        (root / Path(plain.files[i]).relative_to(plain.root)).unlink()
    for folder in (root / "val").iterdir():
        if not any(folder.iterdir()):
            folder.rmdir()
    folder = tmp_path / "report"
    assert main.main([*plain.flags, "--report", str(folder)]) == 0
    assert (folder / "mistakes.png").exists()
    assert main.main([*plain.flags, "--report", str(folder), "--data-path", str(root)]) == 0
    assert sorted(os.listdir(folder)) == [
        "classes.csv",
        "confusion.csv",
        "confusion.png",
        "predictions.csv",
        "report.json",
    ]
    scalars = json.loads((folder / "report.json").read_text())
    assert scalars["accuracy"] == scalars["balanced_accuracy"] == scalars["macro_f1"] == 1
    assert "mistakes.png" in capsys.readouterr().out


def test_images_without_files_are_named_by_their_number_and_32_mistakes_are_shown(tiny_run, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **_: shown.append(text))
    words = ["--eval", "--resume", str(tiny_run / "checkpoint.pth"), "--device", "cpu", "--report", str(tmp_path)]
    assert main.main(words) == 0
    rows = read(tmp_path / "predictions.csv")
    assert [row["file"] for row in rows] == [f"image {i}" for i in range(360)]
    logged = json.loads((tiny_run / "log.txt").read_text())
    assert sum(row["label"] == row["prediction"] for row in rows) / 3.6 == pytest.approx(logged["test_acc1"])
    # the most confident ones, in order
    wrong = [row for row in rows if row["label"] != row["prediction"]]
    assert len(wrong) > 32
    confidence = sorted((float(row[row["prediction"]]) for row in wrong), reverse=True)
    by_file = {row["file"]: row for row in wrong}
    first = [by_file[text.split("\n")[0]] for text in shown]
    assert [float(row[row["prediction"]]) for row in first] == pytest.approx(confidence[:32], abs=1e-6)
    assert len({row["file"] for row in first}) == 32


def test_names_of_files_need_not_be_utf_8(plain, tmp_path, capfd):
    root = shutil.copytree(plain.root, tmp_path / "data")
    image = next((root / "val" / CLASSES[0]).iterdir())
    os.rename(image, os.fsencode(image.parent) + b"/caf\xe9.bmp")
    for split in ("train", "val"):
        os.rename(root / split / CLASSES[0], os.fsencode(root / split) + b"/caf\xe9")
    report_folder = tmp_path / "report"
    flags = [*plain.flags, "--data-path", str(root)]
    assert main.main([*flags, "--report", str(report_folder)]) == 0
    flags.remove("--eval")
    assert main.main([*flags, "--visualize", "attention", "--output_dir", str(tmp_path)]) == 0
    assert b"caf\xe9.bmp" in (report_folder / "predictions.csv").read_bytes()

    table = tmp_path / "table.csv"
    checkpoint = plain.flags[plain.flags.index("--resume") + 1]
    model = ["--model", "dhvt_tiny_cifar_patch4", "--model-kwargs", "depth=1", "embed_dim=32", "num_heads=2"]
    words = [str(root / "val"), "--checkpoint", checkpoint, *model, "--csv", str(table), "--device", "cpu"]
    capfd.readouterr()
    assert predict.main([*words, "--nb-classes", "5"]) == 0
    assert b"caf\xe9.bmp" in table.read_bytes() and "caf?.bmp" in capfd.readouterr().out


def test_shares_are_put_in_the_data_sets_order_and_may_be_empty():
    logits = torch.randn(3, 4)
    first = [2, 0], [(torch.tensor([12]), logits[2:]), (torch.tensor([10]), logits[:1])]
    targets, probabilities = report.merge_shares([first, ([], []), ([1], [(torch.tensor([11]), logits[1:2])])])
    assert targets.tolist() == [10, 11, 12]
    assert np.allclose(probabilities, logits.softmax(dim=1), atol=1e-6)


def test_calibration_error_is_that_of_a_loop_over_bins_at_their_edges_too():
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.random(200), [1.0, 0.2, 0.6, 1 / 15, 2 / 3, 1e-9]])
    correct = rng.random(len(confidence)) < confidence**2
    found = report.calibration_error(confidence, correct)
    assert found > 0.05 and found == pytest.approx(hand_made_ece(confidence.tolist(), correct.tolist()))
    assert report.calibration_error(np.array([1.0, 1.0]), np.array([True, False])) == 0.5


@pytest.mark.parametrize(("classes", "names", "counts"), [(15, True, True), (16, True, False), (41, False, False)])
def test_the_confusion_matrix_is_drawn_as_far_as_it_can_be_read(classes, names, counts):
    confusion = np.zeros((classes, classes), int)
    confusion[0, 1] = 3
    confusion[0, 0] = 1
    axes, _ = report.draw_confusion(confusion, [f"c{i}" for i in range(classes)]).axes
    assert ([label.get_text() for label in axes.get_yticklabels()] == [f"c{i}" for i in range(classes)]) == names
    assert [text.get_text() for text in axes.texts][:3] == (["1", "3", "0"] if counts else [])
    places = [text.get_position() for text in axes.texts if text.get_text() == "3"]
    assert places == ([(1, 0)] if counts else [])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction", "label")
    assert axes.images[0].get_array()[0, :2].tolist() == [0.25, 0.75] and axes.images[0].get_array().sum() == 1
