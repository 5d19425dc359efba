"""Measuring speed: interleaved ratios, and the command over them."""

import time
from typing import ClassVar

import pytest
import torch
from torch import nn

import engine
import folder2lmdb
import speed_test

PRECISION = engine.Precision(torch.device("cpu"))
TINY = "patch_size=16,embed_dim=32,depth=2,num_heads=2"


class Slow(nn.Module):
    calls: ClassVar[list[float]] = []  # of all, copies too

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        self.calls.append(self.seconds)
        return x.mean(dim=(1, 2, 3))


def test_a_model_is_compared_with_its_baseline_in_turns():
    fast, slow = Slow(0.005), Slow(0.02)
    Slow.calls.clear()
    found = engine.compare(fast, slow, (8, 8), 2, PRECISION, pairs=5)
    assert 2.5 < found["ratio"] < 4.5 and found["ratio_q1"] <= found["ratio"] <= found["ratio_q3"]
    assert Slow.calls[4:] == [0.005, 0.02] * 5  # the first four warm up
    assert found["images_per_s"] == pytest.approx(found["ratio"] * found["baseline_images_per_s"], rel=0.3)


def test_models_are_found_by_name_pattern_and_arguments():
    found = speed_test.find_models(
        ["dhvt_tiny_cifar*", "deit_tiny_patch16_shrink_base:base_keep_rate=0.5,fuse_token=true"]
    )
    assert [name for name, _ in found[:2]] == ["dhvt_tiny_cifar_patch2", "dhvt_tiny_cifar_patch4"]
    assert found[2] == ("deit_tiny_patch16_shrink_base", {"base_keep_rate": 0.5, "fuse_token": True})


def test_a_model_that_fails_is_a_row(capsys):
    good = f"deit_tiny_patch16_224:{TINY}"
    words = [good.replace("num_heads=2", "num_heads=5"), good, "--baseline", good, "--batch-size", "2", "--pairs", "3"]
    words += ["--device", "cpu", "--input-size", "32", "--mode", "inference"]
    assert speed_test.main(words) == 0
    _, head, failed, row = capsys.readouterr().out.splitlines()
    assert "num_heads=5" in failed and ": failed (" in failed and "divisible" in failed
    assert head.endswith("times baseline") and " to " in row and row.endswith(")")


def test_loaders_are_measured_beside_their_ceilings(tree, capsys):
    root = tree(count=12, side=40)
    words = ["--loader", str(root), "--batch-size", "4", "--input-size", "32", "--workers", "0", "1", "--pairs", "2"]
    assert folder2lmdb.main(["--dir", str(root), "--split", "train"]) == 0
    capsys.readouterr()
    assert speed_test.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14 and "0 worker(s)" in lines[0] and "1 worker(s)" in lines[7]
    assert [line[:12].strip() for line in lines[1:7]] == ["timm", "fast", "decode", "read", "fast, LMDB", "read, LMDB"]
    assert all(float(line[12:].split()[0]) > 0 and "times timm's" in line for line in [*lines[1:7], *lines[8:]])


@pytest.mark.parametrize(
    ("words", "value", "remedy"),
    [
        ("nosuchmodel", "nosuchmodel", "timm.list_models()"),
        ("nosuch*", "nosuch*", "timm.list_models()"),
        ("resnet18:depth", "resnet18:depth", "key=value"),
        ("resnet18 --batch-size 0", "--batch-size 0", "at least 1"),
        ("resnet18 --max-batch-size 0", "--max-batch-size 0", "at least 1"),
        ("resnet18 --seconds 0", "--seconds 0", "above 0"),
        ("resnet18 --output_dir LICENSE", "LICENSE", "name a folder"),
        ("resnet18 --output_dir /proc/nowhere", "/proc/nowhere", "name another folder"),
        ("resnet18 --loader x", "models to measure", "--loader DATA"),
        ("--loader x --data-set DIGITS --input-size 0", "--input-size 0", "height and width"),
        ("--loader x --data-set NOPE", "NOPE", "FOLDER"),
        ("--loader nowhere", "nowhere/train", "no such folder"),
        ("resnet18 --basline x", "--basline", "did you mean --baseline?"),
    ],
)
def test_what_can_be_mended_is_one_line(words, value, remedy, capsys):
    assert speed_test.main([*words.split(), "--device", "cpu"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("speed_test.py: error: ") and line.count("\n") == 1 and value in line and remedy in line
