"""Jobs: submitit's local executor here and by default; a real Slurm of two nodes under the slurm marker."""

import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import TINY
from test_distributed import finish, start
from test_faults import wait_for
from test_resume import differences, log_of

import main
import run_with_submitit
from util import checkpoint

ROOT = Path(main.__file__).parent
FLAGS = [*TINY.split(), "--epochs", "2"]


def script(*words: str, capsys) -> str:
    assert run_with_submitit.main(["--dry-run", *words]) == 0
    return capsys.readouterr().out


def test_the_job_script_has_what_was_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "--nodes 2 --ngpus 8 --partition gpu --account lab --qos high --constraint a100 --timeout 600 --mem 400GB"
    words += " --slurm gres=gpu:8 mail-type=END --model dhvt_tiny_imagenet_patch16 --data-set DIGITS --output_dir out/x"
    text = script(*words.split(), capsys=capsys)
    lines = "nodes=2 ntasks-per-node=8 gpus-per-node=8 partition=gpu account=lab qos=high time=600 constraint=a100"
    for line in (lines + " mem=400GB gres=gpu:8 mail-type=END requeue signal=USR2@120").split():
        assert f"#SBATCH --{line}\n" in text, line
    assert f"{tmp_path}/out/x/submitit/" in text and "--kill-on-bad-exit=1" in text
    assert list(tmp_path.iterdir()) == []


BAD = {
    "flag": ("--bach-size 8 --output_dir o", "--bach-size", "did you mean --batch-size?"),
    "no folder": ("--data-set DIGITS", "--output_dir", "FOLDER"),
    "nodes": ("--nodes 0 --data-set DIGITS --output_dir o", "--nodes 0", "at least 1"),
    "GPUs": ("--ngpus -2 --data-set DIGITS --output_dir o", "--ngpus -2", "0 or more"),
    "tasks": ("--tasks-per-node 0 --data-set DIGITS --output_dir o", "--tasks-per-node 0", "at least 1"),
    "out below a file": ("--cluster local --data-set DIGITS --output_dir note/o", "note/o", "Not a directory"),
    "pairs": ("--slurm gres --data-set DIGITS --output_dir o", "--slurm", "key=value"),
    "local nodes": ("--cluster local --nodes 2 --data-set DIGITS --output_dir o", "--nodes 2", "leave it out"),
    "no Slurm": ("--data-set DIGITS --output_dir o", "--cluster slurm", "--cluster local"),
}


@pytest.mark.parametrize("row", BAD)
def test_what_cannot_be_submitted_is_one_line(row, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    Path("note").touch()
    words, value, remedy = BAD[row]
    assert run_with_submitit.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run_with_submitit.py: error: ") and value in line and remedy in line


def test_a_job_that_sbatch_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    for name, text in (
        ("srun", "exit 0"),
        ("sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", "")  # it sets it, and it is put back
    words = ["--partition", "x", "--data-set", "DIGITS", "--output_dir", str(tmp_path / "o")]
    assert run_with_submitit.main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("run_with_submitit.py: error: sbatch refuses the job (") and "invalid partition" in line


def test_a_missing_submitit_is_said(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "submitit":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert run_with_submitit.main(["--data-set", "DIGITS", "--output_dir", str(tmp_path / "o")]) == 2
    assert "submitit is not installed: pip install -r requirements-extra.txt" in capsys.readouterr().err


def submit(out: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "run_with_submitit.py"), "--cluster", "local", "--tasks-per-node", "2"]
    return start([*command, *FLAGS, *words, "--output_dir", str(out)])


def test_two_local_tasks_are_stopped_and_go_on_to_the_end(tmp_path):
    """The signal comes to submitit's controller, which forwards it, as Slurm sends it to all tasks."""
    out = tmp_path / "out"
    process = submit(out, "--epochs", "400")
    try:
        wait_for((out / "checkpoint_0001.pth").exists)
        job = int(process.stdout.readline().split()[1].rstrip(":"))
        os.kill(job, signal.SIGTERM)
        status, printed, error = finish(process, 60)
    finally:
        process.kill()
    assert status == 75 and "the same command goes on with it" in printed, error
    done = checkpoint.load(out / "checkpoint.pth")["epoch"] + 1
    status, printed, error = finish(submit(out, "--epochs", str(done + 2)), 120)
    assert status == 0, error
    assert [line["epoch"] for line in log_of(out)] == list(range(done + 2))
    assert json.loads((out / "args.json").read_text())["processes"] == 2


def test_a_job_for_debugging_runs_in_this_process(tmp_path, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"):
        monkeypatch.setenv(name, "")  # it sets them, and they are put back
    words = ["--cluster", "debug", *FLAGS, "--epochs", "1", "--output_dir", str(tmp_path / "out")]
    assert run_with_submitit.main(words) == 0
    assert log_of(tmp_path / "out")[0]["epoch"] == 0


def test_a_job_that_fails_says_so(tmp_path):
    status, _, error = finish(submit(tmp_path / "out", "--batch-size", "2000"), 120)
    assert status == 2
    (line,) = [line for line in error.splitlines() if line.startswith("run_with_submitit.py: error: ")]
    assert "[rank 0]: --batch-size 2000: 1437 training images give each" in line


def test_two_nodes_of_torchrun_train_and_evaluate(tmp_path):
    """Two agents on loopback that meet by c10d, each with one process."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}", "--rdzv-id=digits", "--local-addr=127.0.0.1"]
    out = tmp_path / "out"
    for last in (["--output_dir", str(out)], ["--eval", "--resume", str(out / "checkpoint.pth")]):
        agents = [start([*torchrun, str(ROOT / "main.py"), *FLAGS, *last]) for _ in range(2)]
        ends = [finish(agent) for agent in agents]
        assert [status for status, _, _ in ends] == [0, 0], [error for _, _, error in ends]
        assert sum("on the 360 test images" in printed for _, printed, _ in ends) == 1
    assert [line["epoch"] for line in log_of(out)] == [0, 1]
    assert json.loads((out / "args.json").read_text())["processes"] == 2


# a real Slurm


@pytest.fixture(scope="module")
def slurm():
    """Start two nodes on this machine, as root of a Debian, and give the environment that speaks to them."""
    base = Path(tempfile.mkdtemp(prefix="slurm"))
    base.chmod(0o755)  # munge wants to be found by all
    environment = os.environ | {"SLURM_BASE": str(base)}
    subprocess.run(["bash", str(ROOT / "tests" / "slurm_up.sh")], env=environment, check=True, timeout=300)
    environment |= {"SLURM_CONF": str(base / "slurm.conf"), "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    try:
        yield environment | {"OMP_NUM_THREADS": "1"}
    finally:
        subprocess.run(["bash", str(ROOT / "tests" / "slurm_down.sh")], env=environment, check=True, timeout=120)
        shutil.rmtree(base)


def slurm_submit(slurm, out: Path, *words: str) -> str:
    command = [sys.executable, str(ROOT / "run_with_submitit.py"), "--nodes", "2", "--tasks-per-node", "1"]
    command += ["--cpus-per-task", "1", *FLAGS, *words, "--output_dir", str(out)]
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1].rstrip(":")


def state(slurm, job: str) -> dict[str, str]:
    done = subprocess.run(["scontrol", "show", "job", job], env=slurm, capture_output=True, text=True, timeout=30)
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)


def wait_for_end(slurm, job: str, out: Path, seconds: float = 240) -> dict[str, str]:
    end = time.monotonic() + seconds
    while (found := state(slurm, job))["JobState"] not in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"):
        assert time.monotonic() < end, (found, read_logs(out))
        time.sleep(0.5)
    assert found["JobState"] == "COMPLETED", (found, read_logs(out))
    return found


def read_logs(out: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted((out / "submitit").glob("*_log.*")))


LONG = ["--epochs", "60", "--batch-size", "64"]


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    found = wait_for_end(slurm, slurm_submit(slurm, out, *LONG), out)
    assert found["NumNodes"] == "2" and found["Restarts"] == "0"
    return out


def assert_same_end(out: Path, whole: Path) -> None:
    one, two = (checkpoint.load(folder / "checkpoint.pth") for folder in (whole, out))
    one["args"] = two["args"] = None
    assert differences(one, two) == [] and log_of(out) == log_of(whole)


@pytest.mark.slurm
@pytest.mark.parametrize("how", ["USR2", "requeue", "preemption", "time limit"])
def test_a_job_that_is_disturbed_ends_as_the_undisturbed_one(slurm, undisturbed, tmp_path, how):
    out = tmp_path / "out"
    job = slurm_submit(
        slurm, out, *(["--timeout", "1", "--slurm", "signal=USR2@40"] if how == "time limit" else []), *LONG
    )
    wait_for((out / "checkpoint_0004.pth").exists, 120)
    run = {"env": slurm, "check": True, "timeout": 60}
    if how == "USR2":
        subprocess.run(["scancel", "--signal=USR2", f"{job}.0"], **run)
    elif how == "requeue":
        subprocess.run(["scontrol", "requeue", job], **run)
    elif how == "preemption":
        other = ["sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"]
        subprocess.run(other, **run, stdout=subprocess.DEVNULL)
    found = wait_for_end(slurm, job, out, 400)
    assert int(found["Restarts"]) >= 1
    assert_same_end(out, undisturbed)


@pytest.mark.slurm
def test_a_process_that_dies_ends_the_job(slurm, tmp_path):
    out = tmp_path / "out"
    job = slurm_submit(slurm, out, "--epochs", "500")
    wait_for((out / "checkpoint_0001.pth").exists, 120)
    subprocess.run(["scancel", "--signal=KILL", f"{job}.0"], env=slurm, check=True, timeout=60)
    end = time.monotonic() + 90
    while (found := state(slurm, job))["JobState"] not in ("FAILED", "CANCELLED"):
        assert time.monotonic() < end, found
        time.sleep(0.5)


@pytest.mark.slurm
def test_an_interactive_shell_of_one_task_is_one_process(slurm, tmp_path):
    command = ["srun", "--nodes=1", "--ntasks=1", sys.executable, str(ROOT / "main.py"), *FLAGS, "--epochs", "1"]
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "x 1 process(es) x" in done.stdout
