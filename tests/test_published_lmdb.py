"""Databases that the published script wrote, read as they are."""

import copy
import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

import datasets
import main
from folder2lmdb import ImageDatabase
from util.errors import InputError

GOLDEN = Path(__file__).parent / "golden" / "legacy_digits.lmdb"


def test_every_record_is_a_digit_with_its_label():
    records, digits = ImageDatabase(GOLDEN), load_digits()
    assert len(records) == 40 and records.classes == list("0123456789") and not records.named
    for i in range(40):
        data, label = records[i]
        assert label == digits.target[i]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.rint(digits.images[i] * (255 / 16)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # two workers on one core
def test_workers_read_what_the_parent_reads_before_and_after():
    dataset = datasets.DatabaseImages(GOLDEN, pil_to_tensor)
    expected = [dataset[i] for i in range(40)]
    loader = DataLoader(dataset, batch_size=16, num_workers=2)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert torch.equal(images, torch.stack([image for image, _ in expected]))
    assert labels.tolist() == [label for _, label in expected]
    assert all(torch.equal(dataset[i][0], expected[i][0]) for i in range(40))


def test_copies_and_pickles_read_on():
    records = ImageDatabase(GOLDEN)
    for other in (copy.deepcopy(records), pickle.loads(pickle.dumps(records)), ImageDatabase(GOLDEN)):
        assert other[7] == records[7]


@pytest.mark.parametrize(
    ("kept", "said"),
    [(0, "not an image database"), (9000, "cut short"), (80000, "cut short"), (-1, "not an image data")],
)
def test_a_file_that_is_not_whole_or_foreign_is_named(tmp_path, kept, said):
    path = tmp_path / "train.lmdb"
    path.write_bytes(GOLDEN.read_bytes()[:kept] if kept >= 0 else b"x" * 50000)
    with pytest.raises(InputError, match=f"train.lmdb: {said}"):
        ImageDatabase(path)


def test_training_and_evaluating_from_a_database(tiny_flags, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.copy(GOLDEN, tmp_path / f"{split}.lmdb")
    flags = [*tiny_flags, "--data-set", "IMNET", "--data-path", str(tmp_path), "--use-lmdb", "--batch-size", "8"]
    assert main.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    assert "40 training and 40 test images" in capsys.readouterr().out
    assert main.main([*flags, "--eval", "--resume", str(tmp_path / "out" / "checkpoint.pth")]) == 0
    assert "on the 40 test images" in capsys.readouterr().out
    assert torch.load(tmp_path / "out" / "checkpoint.pth")["classes"] == [str(i) for i in range(10)]


def test_a_label_beyond_the_training_classes_is_named():
    with pytest.raises(InputError, match="label 9 is not among the 4 training classes"):
        datasets.DatabaseImages(GOLDEN, class_to_idx={c: i for i, c in enumerate("abcd")})
