"""Measuring speed: ratios of times taken in turns, and the command over them."""

import json

import pytest
from matplotlib.figure import Figure

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


FLAGS = ["--compile", "--channels-last", "--grad-checkpointing"]


@pytest.mark.parametrize("flag", [None, *FLAGS])
def test_modes_and_flags_reach_the_steps_of_the_model_and_its_baseline(flag, monkeypatch):
    """Steps that do nothing; two and four heads tell the models apart."""
    made = []
    ran = []

    def make_step(model, input_size, batch_size, precision, train, compile_mode):
        heads = model.blocks[0].attn.num_heads
        flags = (bool(compile_mode), precision.channels_last, model.grad_checkpointing)
        made.append((heads, input_size, batch_size, train, *flags))
        return lambda: ran.append(heads)

    monkeypatch.setattr(engine, "make_step", make_step)
    monkeypatch.setattr(engine, "matrix_rate", lambda *_: 1.0)
    words = [f"{TINY}=2", "--device", "cpu", "--batch-size", "3", "--seconds", "0.001", "--pairs", "2"]
    words += [flag] if flag else []
    given = [flag == name for name in FLAGS]
    assert speed_test.main([*words, "--input-size", "32"]) == 0
    assert made == [(2, (32, 32), 3, train, *given) for train in (False, True)] and set(ran) == {2}
    made.clear()
    ran.clear()
    # the baseline keeps its size
    assert speed_test.main([*words, "--image-sizes", "32", "--baseline", f"{TINY}=4"]) == 0
    sizes = {2: (32, 32), 4: (224, 224)}
    assert made == [(heads, sizes[heads], 3, train, *given) for train in (False, True) for heads in (2, 4)]
    assert ran == [2, 4] * 2 * (2 + 2)


def test_published_accuracies_are_those_of_224_pixels(tmp_path, monkeypatch):
    row = {"images_per_s": 1.0, "spread": 1.0, "steady": True, "share": 1.0}
    monkeypatch.setattr(engine, "count_macs", lambda *_: 1.0)
    monkeypatch.setattr(engine, "benchmark", lambda *_, **__: row)
    words = ["deit_tiny_patch16_224", "--device", "cpu", "--mode", "inference", "--batch-size", "1"]
    assert speed_test.main([*words, "--image-sizes", "192", "224", "--output_dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["top1"] for row in rows] == [None, 72.2]


def test_the_picture_has_the_quartiles_as_bars_and_a_white_dot_where_it_is_unsteady(tmp_path, monkeypatch):
    # by batch size: images/s, interquartile range in percent, steady
    measured = {1: (100.0, 2.0, True), 2: (150.0, 40.0, False), 4: (200.0, 1.0, True)}
    figures = []

    def benchmark(*_, batch_size, **__):
        return dict(zip(("images_per_s", "spread", "steady"), measured[batch_size], strict=True), share=1.0)

    monkeypatch.setattr(engine, "benchmark", benchmark)
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    words = [f"{TINY}=2", "--device", "cpu", "--mode", "inference", "--input-size", "32", "--batch-size", "1", "2", "4"]
    assert speed_test.main([*words, "--output_dir", str(tmp_path)]) == 0
    (axes,) = figures[0].axes
    (container,) = axes.containers
    bars = [segment.ravel().tolist() for segment in container.lines[2][0].get_segments()]
    assert bars == [pytest.approx(bar) for bar in ([1, 99, 1, 101], [2, 120, 2, 180], [4, 199, 4, 201])]
    white, _ = (line for line in axes.lines if line.get_markerfacecolor() == "w")
    assert white.get_xydata()[white.get_markevery()].tolist() == [[2, 150]]


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
