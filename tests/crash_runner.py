"""Run main.py in forked processes that end themselves at given moments; commands come as JSON lines on stdin.

A command has `flags`, `ranks`, `seconds` (the limit, and `grace` seconds after a process has ended for those after it),
`out` (a folder for what the processes print), `largest` (bytes that a file may have, or null) and `kill`, which is null
or has `rank`, `moment` (a key of MOMENTS), `count` (which time it comes) and `signal`. The answer has each rank's
`status` (negative: the signal that ended it; "hung" beyond the limit), the `seconds` that passed, `reached` (whether
the signal was sent), `orphans` (processes that outlived their ranks by ten seconds; they are ended) and `steps`, how
many updates rank 0 made. torch is imported once, and nothing was run in the parent, so forks are cheap.
"""

import io
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

import engine
import main
import training
from util import checkpoint, distributed, run_state

torch.set_num_threads(1)
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# where the signal comes: (object, its function), before or after the call
MOMENTS: dict[str, tuple[object, str, bool]] = {
    "start: data": (training.datasets, "build_train_dataset", False),
    "start: model": (training, "start_model", False),
    "start: files": (training, "start", False),
    "start: first files": (training, "start", True),
    "step: before it": (engine, "apply_gradients", False),
    "step: weights made": (engine, "apply_gradients", True),
    "step: loss noted": (engine.LossWatch, "add", True),
    "save: begins": (run_state.checkpoint, "save", False),
    "save: a file is half written": (checkpoint.torch, "save", False),
    "save: before a name": (checkpoint, "_publish", False),
    "save: after a name": (checkpoint, "_publish", True),
    "save: done": (run_state.checkpoint, "save", True),
    "evaluation: begins": (training, "evaluate_both", False),
    "evaluation: a batch": (engine, "F", False),
    "evaluation: done": (training, "evaluate_both", True),
    "epoch's end: norms": (distributed, "broadcast_buffers", False),
    "epoch's end: before the log": (training.RunLog, "epoch", False),
    "epoch's end: logged": (training.RunLog, "epoch", True),
    "epoch's end: all of it": (training, "finish_epoch", True),
}


def arm(kill: dict, notify: Callable[[], None]) -> None:
    """Have this process send itself a signal at the `count`th time that the moment comes."""
    owner, name, after = MOMENTS[kill["moment"]]
    left = [kill["count"]]

    def come() -> bool:
        left[0] -= 1
        return left[0] == 0

    def strike() -> None:
        notify()
        os.kill(os.getpid(), kill["signal"])

    original = torch.nn.functional.cross_entropy if name == "F" else getattr(owner, name)

    def wrapped(*args, **kwargs):
        now = come()
        if now and not after:
            if owner is checkpoint.torch:
                write_half(original, *args)
            strike()
            if owner is checkpoint.torch:  # it was no SIGKILL
                args[1].seek(0)
                args[1].truncate()
        result = original(*args, **kwargs)
        if now and after:
            strike()
        return result

    # F is the evaluation's own, not the criterion's
    setattr(owner, name, SimpleNamespace(cross_entropy=wrapped) if name == "F" else wrapped)


def write_half(save: Callable, state: dict, file: io.BufferedWriter) -> None:
    whole = io.BytesIO()
    save(state, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()


def count_steps(note: Callable[[int], None]) -> None:
    add, made = engine.LossWatch.add, [0]

    def counted(*args) -> None:
        made[0] += 1
        note(made[0])
        add(*args)

    engine.LossWatch.add = counted


def run_rank(rank: int, command: dict, port: int) -> None:
    """Be one of a run's processes, and end as main.py would."""
    out = Path(command["out"])
    os.setpgid(0, 0)
    for stream, number in (("out", 1), ("err", 2)):
        handle = os.open(out / f"{stream}{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    for name in LAUNCHER:
        os.environ.pop(name, None)
    if command["ranks"] > 1:
        values = (rank, rank, command["ranks"], command["ranks"], "127.0.0.1", port)
        os.environ |= {name: str(value) for name, value in zip(LAUNCHER, values, strict=True)}
    if rank == 0:
        count_steps(lambda made: (out / "steps.txt").write_text(str(made)))
    if command["largest"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["largest"], command["largest"]))
    kill = command["kill"]
    if kill is not None and kill["rank"] == rank:
        arm(kill, (out / "reached").touch)
    status = 1
    try:
        status = main.main(command["flags"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def group_members(group: int) -> list[int]:
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[2]) == group:
            found.append(int(entry))
    return found


def wait(pid: int, limit: float) -> int | str:
    """Give a process's exit status, or end it at the limit."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hung"
        time.sleep(0.005)


def run(command: dict) -> dict:
    """Run a command's processes to their ends."""
    out = Path(command["out"])
    out.mkdir(parents=True, exist_ok=True)
    for name in ("reached", "steps.txt"):
        (out / name).unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started, pids = time.monotonic(), []
    for rank in range(command["ranks"]):
        pid = os.fork()
        if not pid:
            run_rank(rank, command, port)
        pids.append(pid)
    statuses, limit = [], started + command["seconds"]
    for pid in pids:
        statuses.append(wait(pid, limit))
        limit = min(limit, time.monotonic() + command["grace"])
    seconds = time.monotonic() - started
    end = time.monotonic() + 10
    while (orphans := [member for pid in pids for member in group_members(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    steps = int((out / "steps.txt").read_text()) if (out / "steps.txt").exists() else 0
    reached = (out / "reached").exists()
    return {"status": statuses, "seconds": seconds, "orphans": len(orphans), "reached": reached, "steps": steps}


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
