"""Run main.py in forked processes that may send themselves a signal at a given moment.

`Runner`, in a test, starts this file as a process and sends it commands as JSON lines. There torch is imported once,
and nothing is ever run in the parent, so that the processes of a run cost no start-up time.
"""

import functools
import importlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision.datasets import folder

import main

ROOT = Path(main.__file__).parent
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Where a signal comes: before or after a library's function, of which the calls are counted
MOMENTS: dict[str, tuple[object, str, str]] = {
    "start: data": (folder, "make_dataset", "before"),
    "start: model": (timm, "create_model", "before"),
    "start: args.json": (json, "dumps", "before"),
    "update: before it": (torch.optim.AdamW, "step", "before"),
    "update: made": (torch.optim.AdamW, "step", "after"),
    "save: a file is half written": (torch, "save", "before"),
    "save: written": (torch, "save", "after"),
    "save: linked": (os, "link", "after"),
    "save: before a name": (os, "replace", "before"),
    "save: after a name": (os, "replace", "after"),
    "evaluation: a batch": (F, "cross_entropy", "before"),
    "epoch's end: log.txt": (json, "dumps", "before"),
    "epoch's end: curves": (matplotlib.figure.Figure, "savefig", "before"),
}
# What a command may have besides flags, out and ranks, see `Runner.__call__`
DEFAULTS = {"call": "main:main", "kill": None, "env": None, "seconds": 120, "grace": 60, "largest": None}
DEFAULTS |= {"start_method": None}


def hide_bf16() -> Callable[[], None]:
    """Hide that the CPU may compute bf16, so that a run without --amp is the same everywhere; return what undoes it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return patch.undo


def arm(moment: str, count: int, strike: Callable[[], None]) -> None:
    """Call `strike` in this process at the `count`th time that the moment comes."""
    owner, name, when = MOMENTS[moment]
    original = getattr(owner, name)
    times = itertools.count(1)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        # the criterion calls cross_entropy too, with another reduction
        counts = owner is not F or kwargs.get("reduction") == "none"
        now = counts and next(times) == count
        if now and when == "before":
            if owner is torch:
                args[1].write(b"PK\x03\x04 and no more")
                args[1].flush()
            strike()
            # it was no SIGKILL
            if owner is torch:
                args[1].seek(0)
                args[1].truncate()
        result = original(*args, **kwargs)
        if now and when == "after":
            strike()
        return result

    setattr(owner, name, wrapped)


def record(out: Path) -> None:
    """Write how many updates are made to updates.txt."""
    made = itertools.count(1)
    register_optimizer_step_post_hook(lambda *_: (out / "updates.txt").write_text(str(next(made))))


def prepare(rank: int, command: dict, port: int) -> None:
    """Give one of a run's processes its output files, launcher's variables and limits."""
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    for stream, number in (("out", 1), ("err", 2)):
        path = Path(command["out"], f"{stream}{rank}.txt")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name in LAUNCHER:
        os.environ.pop(name, None)
    if command["env"]:
        os.environ |= command["env"][rank] | {"MASTER_PORT": str(port)}
    elif command["ranks"] > 1:
        values = (rank, rank, command["ranks"], command["ranks"], "127.0.0.1", port)
        os.environ |= {name: str(value) for name, value in zip(LAUNCHER, values, strict=True)}
    if command["start_method"]:
        multiprocessing.set_start_method(command["start_method"])
    if command["largest"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["largest"], command["largest"]))


def run_rank(rank: int, command: dict, port: int) -> None:
    """Be one of a run's processes, and end as main.py would."""
    status = 1
    try:
        prepare(rank, command, port)
        out = Path(command["out"])
        kill = command["kill"]
        if rank == 0:
            record(out)

        def strike() -> None:
            (out / "reached").touch()
            if kill["signal"] in (signal.SIGKILL, signal.SIGSTOP):
                os.kill(os.getpid(), kill["signal"])
            # as a terminal and Slurm send it: to this rank and its loader workers
            os.killpg(0, kill["signal"])

        if kill and kill["rank"] == rank:
            arm(kill["moment"], kill["count"], strike)
        module, _, name = command["call"].partition(":")
        status = getattr(importlib.import_module(module), name)(command["flags"])
    finally:
        sys.stdout.flush()
        os._exit(status)


def process_stats() -> dict[int, list[str]]:
    """Return the fields of /proc/PID/stat after the name (state, parent, group, …) of all processes."""
    stats = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            stats[int(entry)] = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
        except OSError:
            pass
    return stats


def wait(pid: int, limit: float) -> int | str:
    """Return a process's exit status, or end it at the limit."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hung"
        time.sleep(0.01)


def run(command: dict) -> dict:
    """Run a command's processes to their ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(command["ranks"]):
        pid = os.fork()
        if not pid:
            run_rank(rank, command, port)
        pids.append(pid)
    statuses = []
    limit = time.monotonic() + command["seconds"]
    for pid in pids:
        statuses.append(wait(pid, limit))
        limit = min(limit, time.monotonic() + command["grace"])

    # torch's loader workers look for their parent every five seconds
    end = time.monotonic() + 30
    while True:
        orphans = [pid for pid, fields in process_stats().items() if fields[0] != "Z" and int(fields[2]) in pids]
        if not orphans or time.monotonic() > end:
            break
        time.sleep(0.05)
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    return {"status": statuses, "orphans": len(orphans)}


class Runner:
    """This file in a process of its own."""

    def __enter__(self) -> "Runner":
        paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        env = os.environ | {"PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=env, text=True, **pipes)
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait(60)

    def __call__(self, flags: list[str], out: Path, ranks: int = 1, **more: Any) -> dict[str, Any]:
        """Run main.py with `flags` in `ranks` processes, which print to the folder `out`.

        More may be `call`, "module:function" in place of main.main; `kill`, a dict of rank, moment (of MOMENTS), count
        (which time it comes) and signal; `env`, the launcher's variables for each rank, by default torchrun's;
        `seconds`, the limit for all of them, and `grace`, that for the others after one has ended; `largest`, the size
        in bytes that a file may have; and `start_method`, that of loader workers.

        Returns each rank's `status` (negative: the signal that ended it; "hung" beyond the limit), `out` and `err` as
        printed, whether the kill was `reached`, how many `updates` rank 0 made, and how many `orphans` outlived
        their rank for long.
        """
        out.mkdir(parents=True, exist_ok=True)
        for name in ("reached", "updates.txt"):
            (out / name).unlink(missing_ok=True)
        command = DEFAULTS | {"flags": flags, "out": os.fspath(out), "ranks": ranks} | more
        print(json.dumps(command), file=self.process.stdin, flush=True)
        result = json.loads(self.process.stdout.readline())

        def read(name: str) -> str:
            # a test may have put a device in a file's place
            text = (out / name).read_text() if (out / name).is_file() else ""
            # torch 2.10 prints a line for each connection
            return re.sub(r"^\[Gloo\] Rank .*\n", "", text, flags=re.MULTILINE)

        for stream in ("out", "err"):
            result[stream] = [read(f"{stream}{rank}.txt") for rank in range(ranks)]
        result["reached"] = (out / "reached").exists()
        result["updates"] = int(read("updates.txt") or 0)
        return result


if __name__ == "__main__":
    hide_bf16()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
