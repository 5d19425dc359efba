"""What a run prints and draws of itself: numbers by hand, under a clock that the test moves."""

import time
from dataclasses import replace
from datetime import timedelta

import pytest
import timm
import torch
from matplotlib.axes import Axes

from util import distributed, log, options
from util.checkpoint import TrainState
from util.config import DataConfig, ModelConfig
from util.precision import Precision

NAME = "dhvt_tiny_cifar_patch4"


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Return the time, for a test to change."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def build_state(*words: str, updates: int = 10) -> TrainState:
    """Return the state of a run of ten updates per epoch before its first one."""
    args = options.parse(["--model", NAME, *words])
    model = timm.create_model(NAME, depth=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer.param_groups[0]["initial_lr"] = 1e-3
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(
        model, None, optimizer, None, scaler, ModelConfig(NAME), DataConfig("DIGITS"), "0123456789", vars(args), updates
    )


def test_progress_counts_images_of_all_processes_and_the_time_from_the_resume_on(clock, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    progress = log.EpochProgress(total=10, title="Epoch 4", first=2, seconds_before=50.0)

    def batches():
        while True:
            clock[0] += 1
            yield torch.zeros(8, 3, 1, 1), torch.zeros(8)

    loader = batches()
    for _ in range(4):
        progress.next_batch(loader)
        clock[0] += 4
    # 4 updates of 5 seconds each, of which 1 second is waiting; 4 are left
    assert progress.throughput() == {"images_per_s": pytest.approx(3 * 32 / 20), "data_wait": pytest.approx(0.2)}
    assert progress.seconds == pytest.approx(70)
    progress.report(done=6, loss=1.5, lr=1e-3)
    line = capsys.readouterr().out
    assert "[6/10]" in line and "data 20%" in line and f"left {timedelta(seconds=20)}" in line


def test_the_time_that_is_left_is_that_of_the_epochs_to_come(capsys):
    state = build_state("--epochs", "5")
    state.epoch = 1
    log.print_epoch(state, False, 60.0)
    assert f"{timedelta(minutes=3)} left for 3 epochs" in capsys.readouterr().out
    state.epoch = 4
    log.print_epoch(state, False, 60.0)
    assert capsys.readouterr().out == ""


def test_the_record_of_a_run_has_its_effective_batch_and_rate(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    record = log.describe_run(build_state("--batch-size", "6", "--accum-steps", "4"), Precision(torch.device("cpu")))
    assert (record["effective_batch"], record["processes"], record["effective_lr"]) == (72, 3, 1e-3)


@pytest.mark.parametrize(
    ("words", "updates", "warned"),
    [
        ("--epochs 6 --warmup-epochs 5 --model-ema-decay 0.9", 10, []),
        ("--epochs 5 --warmup-epochs 5 --model-ema-decay 0.9", 10, ["--warmup-epochs 5"]),
        # 0.9 ** 20 is 12 %, 0.9 ** 22 is 9.8 %
        ("--epochs 2 --warmup-epochs 1 --model-ema-decay 0.9", 10, ["--model-ema-decay 0.9"]),
        ("--epochs 2 --warmup-epochs 1 --model-ema-decay 0.9", 11, []),
        ("--epochs 2 --warmup-epochs 1 --model-ema-decay 0.9 --model-ema-warmup", 10, []),
        ("--epochs 6 --min-lr 1e-2 --model-ema-decay 0.9", 10, ["--min-lr 0.01"]),
    ],
)
def test_defaults_that_do_not_suit_a_run_are_named_and_only_those(words, updates, warned, capsys):
    state = replace(build_state(*words.split(), updates=updates), ema=timm.utils.ModelEmaV3(torch.nn.Linear(1, 1)))
    log.print_run_summary(state, images=1000, test_images=100, distinct=300)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("--", "The learning rate"))]
    assert len(said) == len(warned) and all(flag in line for flag, line in zip(warned, said, strict=True))


def test_curves_show_each_number_under_its_name(monkeypatch):
    drawn = {}
    plot = Axes.plot

    def record(axes, x, y, **kwargs):
        drawn[kwargs["label"]] = (axes.get_title(), list(x), list(y))
        return plot(axes, x, y, **kwargs)

    monkeypatch.setattr(Axes, "plot", record)
    keys = ("train_loss", "test_loss", "test_ema_loss", "test_acc1", "test_acc5", "test_ema_acc1", "train_lr")
    lines = [{"epoch": i} | {key: 10.0 * k + i for k, key in enumerate(keys)} for i in range(3)]
    # not evaluated in this epoch
    lines.append({"epoch": 3, "train_loss": 3.0, "train_lr": 63.0})
    log.draw_curves(lines, "$run")
    assert drawn == {
        "training loss": ("loss", [0, 1, 2, 3], [0, 1, 2, 3]),
        "test loss": ("loss", [0, 1, 2], [10, 11, 12]),
        "test loss, EMA": ("loss", [0, 1, 2], [20, 21, 22]),
        "top-1": ("accuracy (%)", [0, 1, 2], [30, 31, 32]),
        "top-5": ("accuracy (%)", [0, 1, 2], [40, 41, 42]),
        "top-1, EMA": ("accuracy (%)", [0, 1, 2], [50, 51, 52]),
        "learning rate": ("learning rate", [0, 1, 2, 3], [60, 61, 62, 63]),
    }
