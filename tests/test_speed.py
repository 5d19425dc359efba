"""Measuring speed: ratios of times taken in turns, and the command over them."""

import pytest

import engine
import folder2lmdb
import speed_test
from tests import bench_loader

TINY = "deit_tiny_patch16_224:patch_size=16,embed_dim=32,depth=2,num_heads"


def test_a_step_is_compared_with_its_baseline_in_turns(monkeypatch):
    """On a clock that the steps move: the machine slows down by half in each turn, and the ratio stays."""
    now = 0.0
    calls = []

    def step(name: str, seconds: float) -> None:
        nonlocal now
        turn = len(calls) // 2
        calls.append(name)
        now += seconds * 1.5**turn

    monkeypatch.setattr(engine, "timer", lambda: now)
    row = engine.compare_steps(
        lambda: step("ours", 1.0),
        lambda: step("baseline", 3.0),
        batch_size=2,
        pairs=5,
    )
    # the first two turns warm up
    assert calls == ["ours", "baseline"] * 7
    assert [row["ratio_q1"], row["ratio"], row["ratio_q3"]] == pytest.approx([3.0] * 3)
    assert row["images_per_s"] == pytest.approx(2 / 1.5**4)
    assert row["baseline_images_per_s"] == pytest.approx(row["images_per_s"] / 3)


def test_models_are_found_by_name_pattern_and_arguments():
    words = ["dhvt_tiny_cifar*", "deit_tiny_patch16_shrink_base:base_keep_rate=0.5,fuse_token=true"]
    configs = list(speed_test.resolve_models(words, [64, 96]).values())
    assert [config.name for config in configs[:2]] == ["dhvt_tiny_cifar_patch2", "dhvt_tiny_cifar_patch4"]
    assert configs[2].name == "deit_tiny_patch16_shrink_base"
    assert configs[2].kwargs == {"base_keep_rate": 0.5, "fuse_token": True}
    assert {config.input_size for config in configs} == {(64, 96)}


def test_a_model_that_fails_is_a_row(capsys):
    words = [f"{TINY}=5", f"{TINY}=2", "--baseline", f"{TINY}=2", "--batch-size", "2", "--pairs", "3"]
    words += ["--device", "cpu", "--input-size", "32", "--mode", "inference"]
    assert speed_test.main(words) == 0
    *_, failed, row = capsys.readouterr().out.splitlines()
    assert "num_heads=5" in failed and "failed (" in failed
    assert "num_heads=2" in row and " to " in row


def test_loaders_are_measured_beside_their_ceilings(tree, capsys):
    root = tree(count=6, side=40)
    words = [str(root), "--batch-size", "4", "--input-size", "32", "--workers", "0", "--pairs", "2"]
    assert folder2lmdb.main(["--dir", str(root), "--split", "train"]) == 0
    capsys.readouterr()
    assert bench_loader.main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "times timm's" in line]
    assert [line[:12].strip() for line in lines] == list(bench_loader.WAYS)
    assert all(float(line[12:].split()[0]) > 0 for line in lines)


@pytest.mark.parametrize(
    ("words", "value", "remedy"),
    [
        ("nosuchmodel", "nosuchmodel", "for example"),
        ("resnet18:depth", "resnet18:depth", "KEY=VALUE"),
        ("deit_tiny_patch16_224:img_size=32", "img_size", "--input-size"),
        ("resnet18 --pairs 1", "--pairs: 1", "at least 2"),
        ("resnet18 --basline x", "--basline", "did you mean --baseline?"),
    ],
)
def test_what_can_be_fixed_is_one_line(words, value, remedy, capsys):
    assert speed_test.main([*words.split(), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("speed_test.py: error: ") and value in line and remedy in line
