"""Runs that are killed at every kind of moment end as the undisturbed one does, and leave nothing behind."""

import functools
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGSTOP, SIGTERM, SIGUSR1, SIGUSR2
from typing import Any

import pytest
import torch
from crash_runner import MOMENTS, Runner
from test_resume import differences, log_of

from util import checkpoint
from util.stop_signal import CONTINUE, SAVE, StopSignal

EPOCHS = 3
UPDATES = {1: 18, 2: 9}  # per epoch, by the number of processes
BEST = ["best_checkpoint.pth", "best_ema_checkpoint.pth"]
CHECKPOINTS = [*BEST, "checkpoint.pth", "checkpoint_0001.pth", "checkpoint_0002.pth"]
# By phase the latest time that a random kill waits for: later, and the run would often be finished first
LATEST = {"start": 1, "update": 8, "save": 6, "evaluation": 4, "epoch's end": 1}


def kill(moment: str, count: int, number: int = SIGKILL, rank: int = 0) -> dict[str, Any]:
    return {"moment": moment, "count": count, "signal": int(number), "rank": rank}


@pytest.fixture(scope="module")
def flags(quick_flags) -> list[str]:
    more = "--model-ema-decay 0.9 --lr 1e-2 --print-freq 4 --epochs"
    return [*quick_flags, *more.split(), str(EPOCHS)]


@pytest.fixture(scope="module")
def undisturbed(runner, flags, tmp_path_factory) -> Callable[[int], Path]:
    """Return a function that returns the folder of a whole run of so many processes, with more flags."""

    @functools.cache
    def run(ranks: int, *more: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        result = runner([*flags, *more, "--output_dir", str(folder)], folder.parent, ranks)
        assert result["status"] == [0] * ranks, result["err"]
        return folder

    return run


def assert_same_end(folder: Path, whole: Path) -> None:
    """Compare weights, EMA, optimizer, best accuracy and log; there must be no file more."""
    for name in CHECKPOINTS[:3]:
        one = torch.load(whole / name)
        two = torch.load(folder / name)
        for saved in (one, two):
            saved["args"] = None
            saved["data"]["num_workers"] = None
        assert differences(one, two) == [], name
    assert log_of(folder) == log_of(whole)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([*CHECKPOINTS, "args.json", "curves.png", "log.txt", "runs"])
    assert not list(folder.glob("runs/*.tmp"))


def updates_saved(folder: Path, updates: int) -> int:
    """Return how many updates the newest checkpoint has behind it that can be read; an epoch has `updates`."""
    for path in checkpoint.find_checkpoints(folder):
        saved = torch.load(path)
        return (saved["epoch"] + 1) * updates + (saved["position"] or {"update": 0})["update"]
    return 0


def run_and_kill(
    runner: Runner,
    flags: list[str],
    folder: Path,
    ranks: int,
    kill: dict | None,
    workers: int = 0,
) -> dict[str, Any]:
    """Continue a run until a kill or to its end, and check how it ended; `lost` is how many updates were."""
    before = updates_saved(folder, UPDATES[ranks])
    words = ["--output_dir", str(folder), "--resume", "auto", "--dist-timeout", "60", "--num_workers", str(workers)]
    result = runner([*flags, *words], folder.parent / "printed", ranks, kill=kill)
    case = (kill, result)
    assert "hung" not in result["status"], case
    assert not any("Traceback" in text for text in result["err"]), case
    assert result["orphans"] == 0, case
    after = updates_saved(folder, UPDATES[ranks])
    result["lost"] = before + result["updates"] - after
    if not result["reached"]:
        assert result["status"] == [0] * ranks, case
        return result
    assert 0 <= result["lost"] <= UPDATES[ranks], case
    finished = after == EPOCHS * UPDATES[ranks]
    others = [status for rank, status in enumerate(result["status"]) if rank != kill["rank"]]
    if kill["signal"] == SIGKILL:
        assert result["status"][kill["rank"]] == -SIGKILL, case
        assert others == [1] * len(others) or finished, case
    elif result["status"] == [75] * ranks:
        assert result["lost"] == 0, case
        *received, line = result["err"][0].splitlines()
        name = signal.Signals(kill["signal"]).name if kill["rank"] == 0 else "a signal to another process"
        # said at once where it came
        assert len(received) == (kill["rank"] == 0) and all(text.startswith(f"{name}: ") for text in received), case
        assert line.startswith(f"main.py: stopped by {name} in ") and "--resume auto" in line, case
    else:  # it came after the last update
        assert result["status"] == [0] * ranks and finished, case
    return result


def test_a_run_that_is_killed_again_and_again_ends_as_the_undisturbed_one(runner, flags, undisturbed, tmp_path):
    """The undisturbed one has no workers."""
    for kill_, workers in (
        (kill("start: data", 1, SIGTERM), 0),
        (kill("update: made", 5), 2),
        (kill("save: a file is half written", 1), 0),
        (kill("evaluation: a batch", 3, SIGUSR1), 0),
        (kill("save: after a name", 6), 0),  # best_checkpoint.pth is there, and its epoch is not finished
        (kill("epoch's end: log.txt", 2), 0),  # nor has log.txt its line; args.json was the first
        (kill("epoch's end: curves", 1), 0),  # log.txt has it
        (kill("save: before a name", 9), 0),  # the numbered file has its name, and checkpoint.pth is the one before
        (kill("update: before it", 4, SIGINT), 2),
        (kill("save: linked", 2, SIGUSR2), 0),
        (None, 2),
    ):
        result = run_and_kill(runner, flags, tmp_path / "run", 1, kill_, workers)
        assert result["reached"] == (kill_ is not None), kill_
    assert_same_end(tmp_path / "run", undisturbed(1))


def test_two_processes_that_are_killed_end_as_the_undisturbed_ones_in_bf16(runner, flags, undisturbed, tmp_path):
    bf16 = ("--amp", "bf16")
    for kill_ in (
        kill("update: made", 4, SIGTERM, rank=1),
        kill("update: before it", 3, rank=1),
        kill("evaluation: a batch", 2, SIGTERM, rank=1),
        kill("save: a file is half written", 1),
        None,
    ):
        result = run_and_kill(runner, [*flags, *bf16], tmp_path / "run", 2, kill_)
        assert result["reached"] == (kill_ is not None), kill_
        if kill_ and kill_["signal"] == SIGKILL:
            assert "lost another process" in result["err"][1 - kill_["rank"]]
    assert_same_end(tmp_path / "run", undisturbed(2, *bf16))


@pytest.mark.slow
def test_a_hundred_kills_at_random(runner, flags, undisturbed, tmp_path):
    total: Counter = Counter()
    seed = 0
    while total["kills"] < 100:
        rng = random.Random(seed)
        ranks = (1, 1, 2)[seed % 3]
        folder = tmp_path / str(seed) / "run"
        interval = ["--checkpoint-interval", rng.choice(["0.003", "100"])]
        kills = 0
        while updates_saved(folder, UPDATES[ranks]) < EPOCHS * UPDATES[ranks] and kills < 12:
            phase = list(LATEST)[kills % 5]
            moment = rng.choice([moment for moment in MOMENTS if moment.startswith(phase)])
            # rank 0 alone writes files
            rank = rng.randrange(ranks) if phase in ("update", "evaluation") else 0
            number = rng.choice([SIGKILL, SIGKILL, SIGTERM])
            kill_ = kill(moment, rng.randint(1, LATEST[phase]), number, rank)
            result = run_and_kill(runner, [*flags, *interval], folder, ranks, kill_, workers=2 * (seed % 2))
            if not result["reached"]:
                break
            kills += 1
            total.update(["kills", phase])
        run_and_kill(runner, flags, folder, ranks, None)
        assert_same_end(folder, undisturbed(ranks))
        shutil.rmtree(folder)
        seed += 1
    assert all(total[phase] > 5 for phase in LATEST)


@pytest.mark.parametrize(("number", "status"), [(SIGTERM, -SIGTERM), (SIGINT, 130)])
def test_without_output_dir_a_signal_ends_the_run_as_usual(runner, flags, tmp_path, number, status):
    assert runner(flags, tmp_path, kill=kill("update: made", 2, number))["status"] == [status]


def test_checkpoints_within_an_epoch_come_at_their_interval(runner, flags, tmp_path):
    words = ["--output_dir", str(tmp_path / "run"), "--checkpoint-interval", "0.00001"]
    assert runner([*flags, *words], tmp_path, kill=kill("update: before it", 8))["reached"]
    names = sorted(path.name for path in (tmp_path / "run").glob("*.pth"))
    assert names == ["checkpoint.pth", "checkpoint_0000_000007.pth"]


def test_the_interval_is_in_minutes_and_begins_anew_with_each_save(monkeypatch):
    now = 0
    monkeypatch.setattr(time, "monotonic", lambda: 1e6 + now)
    with StopSignal(1) as stop:
        for now, request in ((59, CONTINUE), (60, SAVE), (61, CONTINUE), (119, CONTINUE), (130, SAVE), (189, CONTINUE)):
            assert stop.agree() == request, now


def test_a_process_that_is_silent_is_given_up_after_the_timeout(runner, flags, tmp_path):
    """Rank 1 is frozen, as by a machine that is gone; rank 0 does not wait for ever."""
    words = ["--output_dir", str(tmp_path / "run"), "--dist-timeout", "5"]
    result = runner([*flags, *words], tmp_path, 2, kill=kill("update: before it", 4, SIGSTOP, rank=1), grace=1)
    assert result["status"] == [1, "hung"] and result["orphans"] == 0
    (line,) = [line for line in result["err"][0].splitlines() if line.startswith("main.py")]
    assert line.startswith("main.py: error [rank 0]: lost another process") and "--dist-timeout" in line


def test_a_file_size_limit_is_one_line_and_leaves_what_was_saved(runner, quick_run, flags, tmp_path):
    """The limit is the kernel's own, which torch's writer meets in the middle of a file."""
    out = tmp_path / "run"
    shutil.copytree(quick_run, out)
    before = {path.name: path.read_bytes() for path in out.glob("*.pth")}
    result = runner([*flags, "--output_dir", str(out), "--resume", "auto"], tmp_path, largest=100_000)
    assert result["status"] == [2], result
    (line,) = result["err"][0].splitlines()
    assert "run: cannot be written (File too large)" in line and "continue with --resume auto" in line
    assert {path.name: path.read_bytes() for path in out.glob("*.pth")} == before


def test_a_full_disk_for_what_is_printed_is_one_line(runner, flags, tmp_path):
    (tmp_path / "out0.txt").symlink_to("/dev/full")
    result = runner([*flags, "--output_dir", str(tmp_path / "run")], tmp_path)
    assert result["status"] == [2]
    (line,) = result["err"][0].splitlines()
    assert line.startswith("main.py: error: ") and "No space left on device" in line
