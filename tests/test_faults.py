"""What happens to launchers, disks and files, one fault at a time; test_survival.py kills runs at any moment."""

import errno
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from crash_runner import process_stats
from PIL import Image
from test_distributed import start
from test_resume import differences, log_of

import main
from data.images import EncodedImage
from losses import ImageLoss
from util import log, weights
from util.errors import InputError

ROOT = Path(main.__file__).parent


@pytest.fixture
def flags(quick_flags, tmp_path) -> list[str]:
    return [*quick_flags, "--output_dir", str(tmp_path / "out"), "--resume", "auto"]


# launchers


def children(pid: int) -> list[int]:
    return [child for child, fields in process_stats().items() if int(fields[1]) == pid]


def is_alive(pid: int) -> bool:
    stats = process_stats()
    return pid in stats and stats[pid][0] != "Z"


def launch(*words: str) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return start([*torchrun, *words])


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def end(process: subprocess.Popen) -> None:
    for pid in [*children(process.pid), process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_processes_save_and_end_when_their_launcher_is_killed(flags, tmp_path):
    process = launch(str(ROOT / "main.py"), *flags, "--epochs", "500")
    try:
        wait_for((tmp_path / "out" / "checkpoint_0000.pth").exists)
        ranks = children(process.pid)
        process.kill()
        process.wait()
        assert len(ranks) == 2
        wait_for(lambda: not any(is_alive(pid) for pid in ranks))
    finally:
        end(process)
    saved = torch.load(tmp_path / "out" / "checkpoint.pth")
    assert (saved["epoch"], saved["position"]) != (-1, None)


@pytest.mark.slow
def test_torchrun_restarts_a_run_by_itself(flags, tmp_path):
    process = launch("--max-restarts=2", str(ROOT / "main.py"), *flags, "--epochs", "6", "--dist-timeout", "60")
    try:
        wait_for((tmp_path / "out" / "checkpoint_0001.pth").exists)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        printed, error = process.communicate(timeout=300)
    finally:
        end(process)
    assert process.returncode == 0, error
    assert "connectFullMesh failed" not in error
    assert "--resume auto: " in printed and "checkpoint_000" in printed
    assert [line["epoch"] for line in log_of(tmp_path / "out")] == list(range(6))


# disks


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [(os, "fsync", 1), (torch, "save", 2), (log.EventsWriter, "write_event", 9), (log, "open", 1)],
)
def test_a_full_disk_is_one_line_and_costs_nothing(
    quick_flags, quick_run, tmp_path, monkeypatch, capsys, owner, name, count
):
    """From the `count`th call on writes fail; then there is room again, and the run continues to the same end."""
    original = getattr(owner, name, open)
    calls = itertools.count(1)

    def write(*args, **kwargs):
        if next(calls) >= count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    flags = [*quick_flags, "--epochs", "1", "--output_dir", str(tmp_path), "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, write, raising=False)
        assert main.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--output_dir {tmp_path}: cannot be written (No space left on device)" in line
    assert main.main(flags) == 0
    one, two = (torch.load(folder / "best_checkpoint.pth") for folder in (quick_run, tmp_path))
    one["args"] = two["args"] = None
    assert differences(one, two) == [] and log_of(tmp_path) == log_of(quick_run)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in quick_run.iterdir())


# images


def bomb() -> bytes:
    """Return a small PNG of 180 million pixels."""
    content = io.BytesIO()
    Image.new("1", (20_000, 9_000)).save(content, "png")
    return content.getvalue()


@pytest.mark.parametrize("content", [bomb(), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"], ids=["bomb", "EPS"])
def test_images_that_would_fill_the_memory_or_start_programs_are_refused(content):
    with pytest.raises(InputError, match="^a.png: not a readable image .*(exceeds limit|cannot identify)"):
        EncodedImage(content, "a.png").decode()


# hostile files


def test_references_to_references_do_not_unfold(quick_run, quick_flags, tmp_path, capsys):
    """Ten tens of tens …: 10^60 values if all were followed."""
    bomb: list = []
    for _ in range(60):
        bomb = [bomb] * 10
    saved = torch.load(quick_run / "checkpoint.pth")
    saved["args"] |= {"opt_betas": bomb, "lr": {"a": bomb}}
    torch.save(saved, tmp_path / "c.pth")
    assert main.main([*quick_flags, "--opt-betas", "0.9", "0.99", "--resume", str(tmp_path / "c.pth")]) == 0
    assert all(len(line) < 1000 for line in capsys.readouterr().out.splitlines())


def test_a_checkpoint_is_downloaded_once_and_what_is_missing_is_one_line(quick_run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=quick_run))
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        downloaded = weights.load(f"{address}/checkpoint.pth")
        # another file of that name, in another folder
        with pytest.raises(InputError, match=f"^{address}/other/checkpoint.pth: cannot be downloaded"):
            weights.load(f"{address}/other/checkpoint.pth")
        with pytest.raises(InputError, match=f"^{address}/missing.pth: cannot be downloaded .*; download it"):
            weights.load(f"{address}/missing.pth")
    finally:
        server.shutdown()
        server.server_close()
    expected = torch.load(quick_run / "checkpoint.pth")
    assert differences(downloaded, expected) == []
    # from torch.hub's cache: the server is gone
    assert differences(weights.load(f"{address}/checkpoint.pth"), expected) == []


def test_a_gpu_without_memory_left_is_one_line(quick_flags, monkeypatch, capsys):
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB.\nSee more")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    capsys.readouterr()
    assert main.main(quick_flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "lower --batch-size" in error and "GPU 0" not in error


def test_what_cannot_be_deterministic_ends_the_run(quick_flags, monkeypatch, capsys):
    def loss(*_):
        return torch.zeros(9).put_(torch.tensor([0]), torch.ones(1), accumulate=False)

    monkeypatch.setattr(ImageLoss, "forward", loss)
    try:
        assert main.main([*quick_flags, "--deterministic"]) == 1
        assert "put_ does not have a deterministic implementation" in capsys.readouterr().err
    finally:
        torch.use_deterministic_algorithms(False)
