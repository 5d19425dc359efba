"""A fault of one process alone: it says so and ends at once, and the other ends within seconds."""

import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from test_distributed import torchrun
from torch import nn

import engine
import main
from util import distributed

ROOT = Path(main.__file__).parent
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

# rank, library's function, which call of it fails, with what, and that rank's exit status
FAULTS = {
    "loader": (1, Image, "open", 40, OSError("broken"), 2),
    "memory": (1, torch.optim.AdamW, "step", 5, torch.OutOfMemoryError("out of memory"), 2),
    "bug": (0, torch.optim.AdamW, "step", 5, ZeroDivisionError("a bug"), 1),
    "save": (0, torch, "save", 1, FULL, 2),
    "log": (0, EventsWriter, "write_event", 3, FULL, 2),
}


def fail(words: list[str]) -> int:
    """Be one process of a run, in which a fault of FAULTS comes to one of them."""
    name, *flags = words
    rank, owner, function, count, error, _ = FAULTS[name]
    original = getattr(owner, function)
    calls = itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) >= count:
            raise error
        return original(*args, **kwargs)

    if int(os.environ["RANK"]) == rank:
        setattr(owner, function, wrapped)
    return main.main(flags)


@pytest.mark.parametrize("name", FAULTS)
def test_the_process_with_the_fault_names_it_and_the_other_ends_too(runner, quick_flags, tmp_path, name):
    rank, *_, error, status = FAULTS[name]
    flags = [*quick_flags, "--batch-size", "4", "--output_dir", str(tmp_path / "run")]
    result = runner([name, *flags], tmp_path, 2, call="test_ranks:fail")
    assert result["status"][rank] == status and result["status"][1 - rank] == 1, result
    assert str(error.args[-1]) in result["err"][rank]
    assert f"main.py: error [rank {1 - rank}]: lost another process" in result["err"][1 - rank]
    assert result["orphans"] == 0


def test_torchrun_ends_with_the_status_and_the_traceback(quick_flags, tmp_path):
    script = tmp_path / "fail.py"
    paths = [str(ROOT), str(ROOT / "tests")]
    script.write_text(
        f"import sys\nsys.path[:0] = {paths}\nimport test_ranks\nsys.exit(test_ranks.fail(sys.argv[1:]))\n"
    )
    flags = [*quick_flags, "--batch-size", "4", "--output_dir", str(tmp_path / "run")]
    status, _, error = torchrun(2, "bug", *flags, script=script)
    assert status == 1 and "ZeroDivisionError: a bug" in error


def save_slowly(flags: list[str]) -> int:
    """Be one process of a run whose files take long to write, and print whether there is one when it ends."""
    save = torch.save

    def slow(*args, **kwargs):
        time.sleep(3)
        return save(*args, **kwargs)

    torch.save = slow
    status = main.main(flags)
    print(Path(flags[-1], "checkpoint.pth").exists())
    return status


def test_a_stopped_process_waits_until_rank_0_has_saved(runner, quick_flags, tmp_path):
    """Launchers kill the others soon after one has ended."""
    flags = [*quick_flags, "--batch-size", "4", "--output_dir", str(tmp_path / "run")]
    stop = {"moment": "update: made", "count": 2, "signal": signal.SIGTERM, "rank": 1}
    result = runner(flags, tmp_path, 2, call="test_ranks:save_slowly", kill=stop)
    assert result["status"] == [75, 75] and result["out"][1] == "True\n", result


def download_slowly(_: list[str]) -> int:
    """Be one of two processes, of which the first downloads for longer than the timeout."""
    distributed.init("cpu", timeout_s=1)
    with distributed.primary_first():
        if distributed.is_primary():
            time.sleep(3)
        print("done", time.time())
    distributed.shutdown()
    return 0


def test_a_download_may_take_longer_than_the_timeout(runner, tmp_path):
    result = runner([], tmp_path, 2, call="test_ranks:download_slowly")
    assert result["status"] == [0, 0], result["err"]
    first, second = (float(text.split()[1]) for text in result["out"])
    assert first < second


def join_on_cuda(words: list[str]) -> int:
    """Be one of two processes that see so many CUDA devices, and print the backend and the device."""
    count, *backend = words
    torch.accelerator.current_accelerator = lambda **_: torch.device("cuda")
    torch.accelerator.device_count = lambda: int(count)
    torch.accelerator.set_device_index = lambda _: None
    dist.is_backend_available = lambda _: True
    join = dist.init_process_group

    def join_by_gloo(backend: str, **kwargs) -> None:
        print(backend)
        join("gloo", **kwargs)

    dist.init_process_group = join_by_gloo
    print(distributed.init("cuda", *backend))
    distributed.shutdown()
    return 0


def test_processes_that_see_one_device_use_gloo_and_say_how_to_choose_nccl(runner, tmp_path):
    result = runner(["1"], tmp_path, 2, call="test_ranks:join_on_cuda")
    assert result["status"] == [0, 0], result["err"]
    line, *printed = result["out"][0].splitlines()
    assert "--dist-backend nccl" in line and printed == ["gloo", "cuda:0"]
    assert result["out"][1] == "gloo\ncuda:0\n"
    # and it is not second-guessed
    result = runner(["1", "nccl"], tmp_path, 2, call="test_ranks:join_on_cuda")
    assert result["out"] == ["nccl\ncuda:0\n"] * 2, result["err"]


def test_processes_with_a_device_each_use_nccl(runner, tmp_path):
    result = runner(["2"], tmp_path, 2, call="test_ranks:join_on_cuda")
    assert result["status"] == [0, 0], result["err"]
    assert result["out"] == ["nccl\ncuda:0\n", "nccl\ncuda:1\n"]


@pytest.mark.parametrize(
    ("name", "local_rank", "index"),
    [(None, 0, 0), (None, 3, 3), ("cuda", 5, 1), ("cuda:1", 0, 1), ("cuda:1", 2, 3), ("cuda:1", 3, 0)],
)
def test_processes_take_the_devices_in_turn(name, local_rank, index, monkeypatch):
    current = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert distributed.pick_device(name, local_rank) == torch.device("cuda", index)
    assert current == [index]


def exchange_on_cuda_group(_: list[str]) -> int:
    """Be one of two processes whose default group, as nccl's, has no CPU tensors."""
    join = dist.init_process_group
    dist.init_process_group = lambda backend, **kwargs: join("cuda:gloo", **kwargs)
    distributed.init("cpu")
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(distributed.rank() + 1.0)
    distributed.broadcast_buffers(norm)
    print(norm.running_mean.tolist())
    rank = distributed.rank()
    print(distributed.all_reduce_max(rank), distributed.broadcast_object(rank), distributed.gather_object(rank))
    distributed.shutdown()
    return 0


def test_what_is_on_the_cpu_is_exchanged_beside_an_accelerators_group(runner, tmp_path):
    result = runner([], tmp_path, 2, call="test_ranks:exchange_on_cuda_group")
    assert result["status"] == [0, 0], result["err"]
    assert result["out"] == [f"[1.0, 1.0, 1.0]\n1 0 {gathered}\n" for gathered in ("[0, 1]", "None")]


def measure(flags: list[str]) -> int:
    """Be one process of a run that measures its speed for a moment."""
    engine.benchmark = partial(engine.benchmark, min_seconds=0.001)
    return main.main(["--test_speed", "--speed-batch-size", "2", *flags])


def test_speed_is_measured_in_two_processes_before_they_train(runner, tiny_flags, tmp_path):
    result = runner([*tiny_flags, "--output_dir", str(tmp_path / "run")], tmp_path, 2, call="test_ranks:measure")
    assert result["status"] == [0, 0], result["err"]
    assert "GMACs" in result["out"][0] and "GMACs" not in result["out"][1]
    assert (tmp_path / "run" / "checkpoint.pth").exists()


# other systems

# What Windows and macOS lack is taken away, also in the spawned worker, which imports this script
ELSEWHERE = """
import os
import signal
import sys

import timm, torchvision  # which look at sys.platform

for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("register_at_fork", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "sigwaitinfo", "sigtimedwait"):
    if hasattr(signal, name):
        delattr(signal, name)

if __name__ == "__main__":
    import multiprocessing

    multiprocessing.set_start_method("spawn")
    import main
    import export, folder2lmdb, predict, run_with_submitit, speed_test

    sys.exit(main.main(sys.argv[1:]))
"""


def test_a_run_needs_nothing_that_windows_and_macos_lack(tiny_flags, tmp_path):
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    words = ["--num_workers", "1", "--output_dir", str(tmp_path / "run")]
    command = [sys.executable, str(script), *tiny_flags, *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoint.pth").exists()


# nodes that join and leave


def wait_until(condition: Callable[[], bool], agent: subprocess.Popen) -> None:
    end = time.monotonic() + 180
    while not condition():
        assert agent.poll() is None and time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_a_run_goes_on_while_nodes_join_and_leave(tiny_flags, tmp_path):
    """Two torchrun agents on one machine. The second one comes, goes, and comes again."""
    out = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--max-restarts=5", "--rdzv-id=mine"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=last_call_timeout=3"]
    command += [str(ROOT / "main.py"), *tiny_flags, *"--batch-size 64 --epochs 40 --resume auto".split()]
    command += ["--dist-timeout", "30", "--output_dir", str(out)]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def start(name: str) -> subprocess.Popen:
        with open(tmp_path / name, "w") as file:
            return subprocess.Popen(command, env=env, stdout=file, stderr=file)

    def printed(words: str) -> int:
        return (tmp_path / "first").read_text().count(words)

    def epochs() -> int:
        return len((out / "log.txt").read_text().splitlines()) if (out / "log.txt").exists() else 0

    agents = [start("first")]
    try:
        wait_until(lambda: epochs() >= 2, agents[0])
        for times in (1, 2):
            agents.append(start("second"))
            wait_until(lambda times=times: printed("effective batch size 128") == times, agents[0])
            before = epochs()
            wait_until(lambda before=before: epochs() >= before + 2, agents[0])
            if times == 1:
                agents[-1].terminate()
                wait_until(lambda: printed("effective batch size 64") == 2, agents[0])
        assert agents[0].wait(300) == 0
    finally:
        for agent in agents:
            agent.kill()
    # from the update that was reached, and no epoch twice
    assert printed(": continues at update") == 3
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(40))
