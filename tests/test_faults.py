"""What happens to launchers, disks and images, one fault at a time; test_survival.py kills runs at any moment."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_database import alive, children
from test_distributed import finish, start
from test_resume import differences, log_of

import main
from util import checkpoint, log, run_state
from util.errors import InputError

ROOT = Path(main.__file__).parent
QUICK = "--model dhvt_tiny_cifar_patch4 --model-kwargs depth=1 embed_dim=32 num_heads=2 --device cpu --num_workers 0"


@pytest.fixture(scope="module")
def data(tree) -> Path:
    return tree(count=24, side=32)


def flags(data: Path, out: Path, *more: str) -> list[str]:
    given = [*QUICK.split(), "--data-set", "FOLDER", "--data-path", str(data), "--batch-size", "8", "--epochs", "2"]
    return [*given, "--warmup-epochs", "0", "--output_dir", str(out), "--resume", "auto", *more]


# launchers


def launch(*words: str) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return start([*torchrun, *words])


def wait_for(condition, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def end(process: subprocess.Popen) -> None:
    for pid in [*children(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()


def test_a_signal_to_torchrun_saves_the_step(data, tmp_path):
    """SIGUSR1, of which torchrun is told; those that it forwards anyway come the same way."""
    words = flags(data, tmp_path / "out", "--epochs", "500")
    process = launch("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", str(ROOT / "main.py"), *words)
    try:
        wait_for((tmp_path / "out" / "checkpoint_0000.pth").exists)
        process.send_signal(signal.SIGUSR1)
        _, error = process.communicate(timeout=30)
    finally:
        end(process)
    assert error.count("stopped by SIGUSR1") == 1 and "go on" not in error
    saved = checkpoint.load(tmp_path / "out" / "checkpoint.pth")
    assert saved["position"] is None or len(saved["position"]["ranks"]) == 2


def test_processes_end_when_their_launcher_is_killed_and_save(data, tmp_path):
    words = flags(data, tmp_path / "out", "--epochs", "500")
    process = launch(str(ROOT / "main.py"), *words)
    try:
        wait_for((tmp_path / "out" / "checkpoint_0000.pth").exists)
        ranks = children(process.pid)
        process.kill()
        process.wait()
        assert len(ranks) == 2
        wait_for(lambda: not any(alive(pid) for pid in ranks), 35)
    finally:
        end(process)
    saved = checkpoint.load(tmp_path / "out" / "checkpoint.pth")
    assert saved["epoch"] >= 0
    run_state.lock(tmp_path / "out")  # it is free
    run_state.unlock()


def test_torchrun_restarts_a_run_by_itself(data, tmp_path):
    words = flags(data, tmp_path / "out", "--epochs", "6", "--dist-timeout", "30")
    process = launch("--max-restarts=2", str(ROOT / "main.py"), *words)
    try:
        wait_for((tmp_path / "out" / "checkpoint_0001.pth").exists)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        printed, error = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 0, error
    assert "connectFullMesh failed" not in error
    assert "--resume auto: " in printed and "checkpoint_000" in printed
    assert [line["epoch"] for line in log_of(tmp_path / "out")] == list(range(6))


def test_a_signal_to_all_processes_of_a_run_leaves_its_workers_to_finish_the_step(data, tmp_path):
    """As a terminal's Ctrl-C, and as Slurm's SIGTERM."""
    words = flags(data, tmp_path / "out", "--epochs", "500", "--num_workers", "2")
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start([sys.executable, "-W", "ignore", str(ROOT / "main.py"), *words])
        try:
            before = set((tmp_path / "out").glob("*.pth"))
            wait_for(lambda before=before: set((tmp_path / "out").glob("*.pth")) - before)
            os.killpg(process.pid, number)
            _, error = process.communicate(timeout=60)
        finally:
            end(process)
        assert process.returncode == 75 and error.startswith(f"main.py: stopped by {signal.Signals(number).name} ")


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    run_state.lock(tmp_path)
    child = os.fork()
    if not child:
        time.sleep(20)
        os._exit(0)
    try:
        time.sleep(1)  # it has begun
        run_state.unlock()
        run_state.lock(tmp_path)
    finally:
        run_state.unlock()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# disks


class Disk:
    """Let `writes` operations on files succeed, and none after them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, writes: int, number: int) -> None:
        self.left, self.number = writes, number
        targets = [(os, "fsync"), (os, "replace"), (os, "link"), (checkpoint.torch, "save"), (log, "open")]
        targets += [(log.EventsWriter, "write_event"), (log.EventsWriter, "flush")]
        targets += [(os, "unlink")] if number == errno.EROFS else []
        for owner, name in targets:
            original = open if owner is log else getattr(owner, name)
            monkeypatch.setattr(owner, name, self.guard(original), raising=False)

    def guard(self, original):
        def operation(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise OSError(self.number, os.strerror(self.number))
            return original(*args, **kwargs)

        return operation


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main.main(flags(data, out)) == 0
    return out


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_at_any_write_is_one_line_and_loses_nothing(data, whole, tmp_path, capsys, number):
    """It fails for good after each number of writes in turn, is mended, and the run goes on to the same end."""
    step, writes, seen = 7, 0, 0
    while True:
        out = tmp_path / str(writes)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, writes, number)
            capsys.readouterr()
            status = main.main(flags(data, out))
        if status == 0:
            assert disk.left >= 0
            break
        lines = capsys.readouterr().err.splitlines()
        assert status == 2 and len(lines) == 1 and os.strerror(number) in lines[0], (writes, lines)
        assert writes or not out.exists()  # the first write only tries
        for path in out.glob("checkpoint*.pth"):
            checkpoint.load(path)
        if seen % 4 == 1:
            assert main.main(flags(data, out)) == 0
            one, two = (checkpoint.load(folder / "best_checkpoint.pth") for folder in (whole, out))
            one["args"] = two["args"] = None
            assert differences(one, two) == [] and log_of(out) == log_of(whole)
            assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())
        writes += step
        seen += 1
    assert seen > 12


def test_too_little_room_for_the_checkpoints_is_found_at_the_start(data, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_state.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert main.main(flags(data, tmp_path / "out")) == 2
    line = capsys.readouterr().err
    assert "1 MiB are free there, too few for 4 checkpoints of" in line and "--keep-checkpoints" in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_vanishes_is_one_line(data, tmp_path, monkeypatch, capsys):
    evaluate = main.training.evaluate_both

    def vanish(*args):
        shutil.rmtree(tmp_path / "out")
        return evaluate(*args)

    monkeypatch.setattr(main.training, "evaluate_both", vanish)
    assert main.main(flags(data, tmp_path / "out")) == 2
    assert "out: cannot be written (No such file or directory)" in capsys.readouterr().err


def test_a_log_of_anything_is_read(tmp_path):
    lines = ["5", "{}", '{"epoch": "1"}', "[" * 100_000, '{"epoch": 3, "train_loss": 1.0}', "\udcff", '{"epo']
    (tmp_path / "log.txt").write_text("\n".join(lines), errors="surrogateescape")
    assert log.RunLog(tmp_path).read() == [{"epoch": 3, "train_loss": 1.0}]


# images


def spoil(root: Path, count: int) -> list[Path]:
    bad = sorted((root / "train").rglob("*.png"))[:count]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    return bad


@pytest.fixture
def spoilt(data, tmp_path) -> Path:
    return shutil.copytree(data, tmp_path / "data")


def test_an_unreadable_image_is_an_error_that_names_it(spoilt, tmp_path, capsys):
    (bad,) = spoil(spoilt, 1)
    assert main.main(flags(spoilt, tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{bad}: not a readable image" in line


def test_skipped_images_are_replaced_alike_whatever_the_workers(spoilt, tmp_path, capfd):
    """One of 48 images is bad; repeated augmentation shows it three times an epoch."""
    (bad,) = spoil(spoilt, 1)
    weights = []
    for workers in ("0", "2"):
        out = tmp_path / workers
        assert main.main(flags(spoilt, out, "--on-bad-image", "skip", "--num_workers", workers)) == 0
        printed = capfd.readouterr()
        assert "3 images could not be read, and others were trained on in their places" in printed.out
        assert f"skipped {bad}: not a readable image" in printed.err
        assert [line["bad_images"] for line in log_of(out)] == [3, 3]
        weights.append(checkpoint.load(out / "checkpoint.pth")["model"])
    assert differences(*weights) == []


def test_two_processes_count_their_skipped_images_together(spoilt, tmp_path):
    spoil(spoilt, 1)
    words = flags(spoilt, tmp_path / "out", "--on-bad-image", "skip", "--no-repeated-aug", "--epochs", "1")
    status, _, error = finish(launch(str(ROOT / "main.py"), *words))
    assert status == 0, error
    assert [line["bad_images"] for line in log_of(tmp_path / "out")] == [1]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_too_many_unreadable_images_stop_the_run(spoilt, tmp_path, capfd, workers):
    spoil(spoilt, 6)
    assert main.main(flags(spoilt, tmp_path / "out", "--on-bad-image", "skip", "--num_workers", workers)) == 2
    assert "of 144 images of this epoch could not be read, more than 5%; " in capfd.readouterr().err


def test_an_unreadable_image_of_the_validation_set_is_never_skipped(spoilt, tmp_path, capsys):
    bad = sorted((spoilt / "val").rglob("*.png"))[0]
    bad.write_bytes(b"")
    assert main.main(flags(spoilt, tmp_path / "out", "--on-bad-image", "skip")) == 2
    assert f"{bad}: not a readable image" in capsys.readouterr().err


# hostile files


def load_error(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        checkpoint.load(path)
    return str(caught.value)


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    import zipfile

    torch.save({"model": {"w": torch.zeros(1 << 20)}}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain:
        with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
            for entry in plain.infolist():
                bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < 20_000
    assert "compressed, as PyTorch does not write" in load_error(tmp_path / "bomb.pth")


def test_references_to_references_do_not_unfold(tiny_run, tiny_flags, tmp_path, capsys):
    """Ten tens of tens …: 10^60 values where all were followed."""
    bomb: list = []
    for _ in range(60):
        bomb = [bomb] * 10
    saved = torch.load(tiny_run / "checkpoint.pth")
    saved["args"] |= {"opt_betas": bomb, "lr": {"a": bomb}}
    torch.save(saved, tmp_path / "c.pth")
    assert (
        main.main([*tiny_flags, "--epochs", "2", "--opt-betas", "0.9", "0.99", "--resume", str(tmp_path / "c.pth")])
        == 0
    )
    assert all(len(line) < 400 for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    "change",
    [
        {"update": 10**9}, {"update": "x"}, {"losses": [float("nan")] * 3}, {"losses": None}, {"seconds": [1]},
        {"conditions": []}, {"ranks": []}, {"ranks": [{"numpy": ("x", 1), "python": (3, (1, 2), None)}]}, None,
    ],
)  # fmt: skip
def test_a_position_that_is_none_is_refused(tiny_run, tiny_flags, tmp_path, capsys, change):
    saved = torch.load(tiny_run / "checkpoint.pth")
    conditions = {"updates": 11, "processes": 1, "batch_size": 128, "accum_steps": 1, "seed": 0, "repeated_aug": False}
    good = {"update": 3, "losses": [1.0] * 3, "seconds": 1.0, "conditions": conditions, "ranks": [{}]}
    saved["position"] = 5 if change is None else good | change
    torch.save(saved, tmp_path / "c.pth")
    assert main.main([*tiny_flags, "--epochs", "2", "--resume", str(tmp_path / "c.pth")]) == 2
    assert "its position in the epoch is damaged" in capsys.readouterr().err


def test_a_position_goes_on_with_other_batches_and_says_so(runner_free_position, tiny_flags, tmp_path, capsys):
    words = [*tiny_flags, "--epochs", "2", "--resume", str(runner_free_position), "--batch-size", "64"]
    assert main.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    assert "goes on at update 6 of 22, but not as the run would have: " in capsys.readouterr().out
    assert [line["epoch"] for line in log_of(tmp_path / "out")] == [1]


@pytest.fixture
def runner_free_position(tiny_flags, tmp_path, monkeypatch) -> Path:
    """Give a checkpoint of epoch 1 after 3 of its 11 updates."""
    made = []
    add = main.engine.LossWatch.add

    def count(*args) -> None:
        made.append(1)
        if len(made) == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(main.engine.LossWatch, "add", count)
        assert main.main([*tiny_flags, "--epochs", "2", "--output_dir", str(tmp_path / "half")]) == 75
    return tmp_path / "half" / "checkpoint_0001_000003.pth"


@pytest.mark.parametrize("kind", ["redirect", "endless", "nothing"])
def test_an_address_that_misleads_is_refused(tmp_path, monkeypatch, kind):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if kind == "redirect" else 200)
            if kind == "redirect":
                self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
            try:
                for _ in range(5000 if kind == "endless" else 0):
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                pass

        def log_message(self, *args) -> None:
            pass

    monkeypatch.setattr(checkpoint, "LARGEST_DOWNLOAD", 10 << 20)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies of the first test that had any
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = load_error(f"http://127.0.0.1:{server.server_port}/c.pth")
    finally:
        server.shutdown()
        server.server_close()
    words = {"redirect": "cannot be fetched", "endless": "larger than", "nothing": "not a readable checkpoint"}
    assert words[kind] in said and "\n" not in said


def test_images_that_would_start_programs_or_fill_the_memory_are_refused(spoilt, tmp_path, capsys):
    def bomb(path: Path) -> None:
        import struct
        import zlib

        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))))

    def program(path: Path) -> None:
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n(touched) (w) file closefile\n")

    for i, (make, said) in enumerate(((bomb, "exceeds limit"), (program, "cannot identify image file"))):
        path = sorted((spoilt / "train").rglob("*.png"))[0]
        make(path)
        assert main.main(flags(spoilt, tmp_path / str(i))) == 2
        line = capsys.readouterr().err
        assert f"{path}: not a readable image" in line and said in line
    with pytest.raises(OSError, match="ghostscript|Ghostscript"):  # what Pillow would do with it
        Image.open(path).load()


# the same numbers


def test_deterministic_runs_are_equal_and_say_what_cannot_be(tiny_flags, tmp_path, monkeypatch, capsys):
    try:
        for name in ("a", "b"):
            assert main.main([*tiny_flags, "--deterministic", "--output_dir", str(tmp_path / name)]) == 0
        one, two = (checkpoint.load(tmp_path / name / "checkpoint.pth") for name in ("a", "b"))
        one["args"] = two["args"] = None
        assert differences(one, two) == [] and log_of(tmp_path / "a") == log_of(tmp_path / "b")

        def backward(*_):
            return torch.zeros(9).put_(torch.tensor([0]), torch.ones(1), accumulate=False)

        monkeypatch.setattr(main.engine, "backward", backward)
        assert main.main([*tiny_flags, "--deterministic"]) == 2
        line = capsys.readouterr().err
        assert "main.py: error: --deterministic: put_ does not have a deterministic implementation" in line
    finally:
        torch.use_deterministic_algorithms(False)


def test_args_json_of_a_run_is_json(whole):
    assert json.loads((whole / "args.json").read_text())["on_bad_image"] == "error"
