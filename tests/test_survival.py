"""Runs that are killed at every kind of moment end as the undisturbed one does, and leave nothing behind."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from test_resume import differences, log_of

import main
from util import checkpoint

ROOT = Path(main.__file__).parent
FLAGS = [*TINY.split(), "--epochs", "3", "--model-ema-decay", "0.9", "--lr", "1e-2", "--print-freq", "4"]
UPDATES = {1: 11, 2: 5}  # an epoch's, by the number of processes
NAMES = ["args.json", "best_checkpoint.pth", "checkpoint.pth", "checkpoint_0001.pth", "checkpoint_0002.pth"]
MOMENTS = {  # the latest time that a kill waits for: later, and the run would often be finished first
    "start: data": 1, "start: model": 1, "start: files": 1, "start: first files": 1, "step: before it": 7,
    "step: weights made": 7, "step: loss noted": 7, "save: begins": 1, "save: a file is half written": 2,
    "save: before a name": 3, "save: after a name": 3, "save: done": 2, "evaluation: begins": 1,
    "evaluation: a batch": 3, "evaluation: done": 1, "epoch's end: norms": 1, "epoch's end: before the log": 1,
    "epoch's end: logged": 1, "epoch's end: all of it": 1,
}  # fmt: skip
ANY_RANK = [m for m in MOMENTS if not m.startswith(("save", "epoch's end: before", "epoch's end: logged"))]


class Runner:
    """tests/crash_runner.py in a process of its own."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, str(ROOT / "tests" / "crash_runner.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
        assert self.process.stdout.readline() == "ready\n"

    def __call__(
        self,
        flags: list[str],
        out: Path,
        ranks: int = 1,
        kill: dict | None = None,
        seconds: float = 60,
        largest: int | None = None,
        grace: float = 40,
    ) -> dict[str, Any]:
        command = {"flags": flags, "out": str(out), "ranks": ranks, "kill": kill, "seconds": seconds}
        command |= {"largest": largest, "grace": grace}
        print(json.dumps(command), file=self.process.stdin, flush=True)
        found = json.loads(self.process.stdout.readline())
        errors = [(out / f"err{rank}.txt").read_text() for rank in range(ranks)]
        return found | {"errors": errors}


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.process.stdin.close()
    assert runner.process.wait(30) == 0


@pytest.fixture(scope="module")
def undisturbed(runner, tmp_path_factory) -> dict[int, Path]:
    """Give the folders of whole runs by the number of their processes."""
    folders = {}
    for ranks in UPDATES:
        folder = folders[ranks] = tmp_path_factory.mktemp("whole") / "run"
        found = runner([*FLAGS, "--output_dir", str(folder)], folder.parent, ranks)
        assert found["status"] == [0] * ranks, found["errors"]
    return folders


def assert_same_end(folder: Path, whole: Path) -> None:
    """The same weights, average, optimizer, best accuracy and log, and no file more."""
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        one, two = (checkpoint.load(f / name) for f in (whole, folder))
        one["args"] = two["args"] = None
        assert differences(one, two) == [], name
    assert log_of(folder) == log_of(whole)
    found = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name not in ("log.txt", "curves.png"))
    assert found == NAMES and not list(folder.glob("runs/*.tmp"))


def newest_step(folder: Path, updates: int) -> int:
    """Count the updates that a folder's newest checkpoint that can be read has behind it."""
    for path in checkpoint.find_all(folder):
        saved = checkpoint.load(path)
        return (saved["epoch"] + 1) * updates + (saved["position"] or {"update": 0})["update"]
    return 0


def draw(rng: random.Random, ranks: int, phase: str) -> dict[str, Any]:
    """Choose a moment of a phase, a process and a signal."""
    rank = rng.randrange(ranks)
    moment = rng.choice([m for m in (MOMENTS if rank == 0 else ANY_RANK) if m.startswith(phase)] or ANY_RANK)
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    return {"rank": rank, "moment": moment, "count": rng.randint(1, MOMENTS[moment]), "signal": int(number)}


def torment(
    runner: Runner, whole: Path, folder: Path, ranks: int, kills: int, rng: random.Random, workers: int
) -> Counter:
    """Train with that many kills on the way, resuming after each; count what was lost and left over."""
    flags = [*FLAGS, "--output_dir", str(folder), "--resume", "auto", "--dist-timeout", "20"]
    flags += ["--num_workers", str(workers), "--checkpoint-interval", rng.choice(["0.003", "100"])]
    tally: Counter = Counter()
    done = 0
    phases = ["start", "step", "save", "evaluation", "epoch's end"]
    while True:
        kill = draw(rng, ranks, phases[tally["kills"] % len(phases)]) if tally["kills"] < kills else None
        before = newest_step(folder, UPDATES[ranks])
        found = runner(flags, folder.parent / "printed", ranks, kill)
        tally["orphans"] += found["orphans"]
        assert "hung" not in found["status"], (kill, found)
        assert not any("Traceback" in text for text in found["errors"]), (kill, found["errors"])
        if not found["reached"]:
            assert found["status"] == [0] * ranks, (kill, found)
            done += 1
            if kill is None or newest_step(folder, UPDATES[ranks]) == 3 * UPDATES[ranks] and done > 1:
                break
            if kill is not None:
                continue
        tally["kills"] += 1
        tally[kill["moment"].partition(":")[0]] += 1
        tally[signal.Signals(kill["signal"]).name] += 1
        lost = before + found["steps"] - newest_step(folder, UPDATES[ranks])
        assert 0 <= lost <= UPDATES[ranks] + 1, (kill, found, lost)
        if kill["signal"] == signal.SIGKILL:
            assert found["status"][kill["rank"]] == -signal.SIGKILL, (kill, found)
            finished = newest_step(folder, UPDATES[ranks]) == 3 * UPDATES[ranks]
            assert ranks == 1 or finished or found["status"][1 - kill["rank"]] != 0, (kill, found)
            tally["steps lost"] += lost
        elif found["status"] == [75] * ranks:
            assert lost == 0, (kill, found, lost)
        else:  # before the others could be asked, or after the last update
            assert kill["moment"].startswith("start") or set(found["status"]) == {0}, (kill, found)
    assert_same_end(folder, whole)
    return tally


@pytest.mark.parametrize(("ranks", "kills", "workers"), [(1, 4, 2), (2, 4, 0)])
def test_a_tormented_run_ends_as_the_undisturbed_one(runner, undisturbed, tmp_path, ranks, kills, workers):
    """The undisturbed ones have no workers."""
    tally = torment(runner, undisturbed[ranks], tmp_path / "run", ranks, kills, random.Random(ranks), workers)
    print(dict(tally))
    assert tally["orphans"] == 0


def test_checkpoints_within_an_epoch_come_at_their_interval(runner, tmp_path):
    flags = [*FLAGS, "--output_dir", str(tmp_path / "run"), "--checkpoint-interval", "0.00001"]
    kill = {"rank": 0, "moment": "step: before it", "count": 8, "signal": int(signal.SIGKILL)}
    assert runner(flags, tmp_path, 1, kill)["reached"]
    names = sorted(p.name for p in (tmp_path / "run").glob("*.pth"))
    assert names == ["checkpoint.pth", "checkpoint_0000_000006.pth", "checkpoint_0000_000007.pth"]


def test_the_best_checkpoint_is_made_up_for_where_a_kill_came_between_two_names(runner, tmp_path):
    flags = [*FLAGS, "--output_dir", str(tmp_path / "run"), "--resume", "auto"]
    kill = {"rank": 0, "moment": "save: after a name", "count": 1, "signal": int(signal.SIGKILL)}
    assert runner(flags, tmp_path, 1, kill)["reached"]
    assert [p.name for p in (tmp_path / "run").glob("*.pth")] == ["checkpoint_0000.pth"]
    assert runner(flags, tmp_path, 1, kill | {"moment": "step: before it"})["reached"]
    assert checkpoint.load(tmp_path / "run" / "best_checkpoint.pth")["epoch"] == 0


def test_what_a_kill_left_of_a_save_goes_with_the_next_run(runner, tmp_path):
    flags = [*FLAGS, "--output_dir", str(tmp_path / "run"), "--resume", "auto"]
    kill = {"rank": 0, "moment": "epoch's end: all of it", "count": 1, "signal": int(signal.SIGKILL)}
    assert runner(flags, tmp_path, 1, kill)["reached"]
    for name in (".checkpoint.new", ".checkpoint_0001_000004.pth.tmp", ".log.txt.tmp"):
        (tmp_path / "run" / name).write_bytes(b"half of it")
    assert runner(flags, tmp_path, 1, kill | {"moment": "step: before it"})["reached"]
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.slow
def test_a_hundred_kills(runner, undisturbed, tmp_path):
    total: Counter = Counter()
    seed = 0
    while total["kills"] < 100:
        ranks, workers = (1, 1, 2)[seed % 3], (0, 2)[seed % 2]
        folder = tmp_path / str(seed) / "run"
        total += torment(runner, undisturbed[ranks], folder, ranks, 12, random.Random(100 + seed), workers)
        shutil.rmtree(folder)
        seed += 1
    print(dict(total))
    phases = ("start", "step", "save", "evaluation", "epoch's end", "SIGKILL", "SIGTERM")
    assert total["orphans"] == 0 and all(total[phase] > 5 for phase in phases)


def test_a_process_that_is_silent_is_given_up_after_the_timeout(runner, tmp_path):
    """Rank 1 is frozen, as by a machine that is gone; rank 0 does not wait for ever."""
    kill = {"rank": 1, "moment": "step: before it", "count": 4, "signal": int(signal.SIGSTOP)}
    flags = [*FLAGS, "--output_dir", str(tmp_path / "run"), "--dist-timeout", "4"]
    found = runner(flags, tmp_path, 2, kill, grace=1)
    assert found["status"] == [1, "hung"] and found["orphans"] == 0
    (line,) = [line for line in found["errors"][0].splitlines() if line.startswith("main.py")]
    assert line.startswith("main.py: error [rank 0]: lost the others: ") and "--dist-timeout" in line


def test_a_file_size_limit_is_one_line_and_leaves_what_was_saved(runner, undisturbed, tmp_path):
    """The limit is the kernel's own, which torch's writer meets in the middle of a file."""
    flags = [*FLAGS, "--output_dir", str(tmp_path / "run"), "--resume", "auto"]
    kill = {"rank": 0, "moment": "epoch's end: all of it", "count": 1, "signal": int(signal.SIGTERM)}
    assert runner(flags, tmp_path, 1, kill)["status"] == [75]
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.pth")}
    found = runner(flags, tmp_path, largest=100_000)
    assert found["status"] == [2], found
    (line,) = found["errors"][0].splitlines()
    assert "run: cannot be written (File too large)" in line and "go on with --resume auto" in line
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.pth")} == before
    assert runner(flags, tmp_path)["status"] == [0]
    assert_same_end(tmp_path / "run", undisturbed[1])


def test_a_full_disk_for_what_is_printed_is_one_line(runner, tmp_path):
    (tmp_path / "out0.txt").symlink_to("/dev/full")
    found = runner([*FLAGS, "--output_dir", str(tmp_path / "run")], tmp_path)
    assert found["status"] == [2]
    assert found["errors"] == [
        "main.py: error: the output cannot be written (No space left on device): send it elsewhere, and start again\n"
    ]
