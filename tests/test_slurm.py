"""Jobs: submitit's local executor here and by default; a real Slurm of two nodes under the slurm marker."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import TINY
from crash_runner import LAUNCHER
from test_faults import wait_for
from test_resume import differences, log_of

import main
import run_with_submitit
from util import options, weights
from util.command import STOPPED
from util.stop_signal import StopSignal

ROOT = Path(main.__file__).parent
FLAGS = [*TINY.split(), "--epochs", "2"]


@pytest.fixture
def environment(monkeypatch) -> None:
    """Put back the variables that run_with_submitit.py sets, and let processes meet on this machine."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in (*LAUNCHER, "PYTHONPATH"):
        monkeypatch.setenv(name, "")


def test_the_job_script_has_what_was_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = (
        "--dry-run --nodes 2 --ngpus 8 --partition gpu --timeout 600 --cpus-per-task 6 --slurm gres=gpu:8 "
        "mail-type=END exclusive --model dhvt_tiny_imagenet_patch16 --data-set DIGITS --output_dir out/x"
    )
    assert run_with_submitit.main(words.split()) == 0
    script = capsys.readouterr().out
    lines = "nodes=2 ntasks-per-node=8 gpus-per-node=8 partition=gpu time=600 cpus-per-task=6 gres=gpu:8 mail-type=END "
    for line in f"{lines} exclusive requeue signal=USR2@120".split():
        assert f"#SBATCH --{line}\n" in script
    (command,) = [line for line in script.splitlines() if line.startswith("srun ")]
    for part in (f"{tmp_path}/out/x/submitit/", "--kill-on-bad-exit=1", "--cpus-per-task=6"):
        assert part in command
    assert list(tmp_path.iterdir()) == []


BAD = {
    "flag": ("--bach-size 8 --output_dir o", "--bach-size", "did you mean --batch-size?"),
    "no folder": ("--data-set DIGITS", "--output_dir", "FOLDER"),
    "out below a file": ("--cluster local --data-set DIGITS --output_dir note/o", "note/o", "Not a directory"),
    "local nodes": ("--cluster local --nodes 2 --data-set DIGITS --output_dir o", "--nodes 2", "leave it out"),
    "no Slurm": ("--data-set DIGITS --output_dir o", "--cluster slurm", "--cluster local"),
}


@pytest.mark.parametrize("row", BAD)
def test_what_cannot_be_submitted_is_one_line(row, tmp_path, monkeypatch, environment, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    Path("note").touch()
    words, value, remedy = BAD[row]
    assert run_with_submitit.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run_with_submitit.py: error: ") and value in line and remedy in line


def test_a_job_that_sbatch_refuses_is_one_line(tmp_path, monkeypatch, environment, capsys):
    for name, line in {"srun": "exit 0", "sbatch": "echo 'sbatch: error: invalid partition: x' >&2; exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert run_with_submitit.main(["--data-set", "DIGITS", "--output_dir", str(tmp_path / "o")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("run_with_submitit.py: error: sbatch refuses the job (") and "invalid partition" in line


@pytest.mark.parametrize(
    ("words", "resume"),
    [("", "auto"), ("--resume c.pth", "c.pth"), ("--eval --resume c.pth", "c.pth"), ("--only_test_speed", "")],
)
def test_a_job_resumes_unless_another_start_is_asked_for(words, resume, tmp_path, monkeypatch, environment):
    calls = []
    monkeypatch.setattr(main, "main", lambda flags: calls.append(flags) or 0)
    flags = ["--cluster", "debug", "--output_dir", str(tmp_path), *FLAGS, *words.split()]
    assert run_with_submitit.main(flags) == 0
    (flags,) = calls
    assert options.parse(flags).resume == resume


@pytest.fixture
def on_slurm(monkeypatch) -> None:
    """Have a task take this process for rank 0 of a job of Slurm."""
    for name, value in {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "12", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("number", "rank", "expected"),
    [
        # it waits for Slurm to end it: a job whose processes end counts as completed
        (signal.SIGUSR2, "0", [["scontrol", "requeue", "12"], "sleep"]),
        (signal.SIGUSR2, "1", []),
        (signal.SIGTERM, "0", ["sleep"]),
        (signal.SIGTERM, "1", []),
    ],
)
def test_only_rank_0_requeues_and_only_at_the_signal_of_the_time_limit(number, rank, expected, on_slurm, monkeypatch):
    """SIGTERM comes from scancel, or from a preemption, after which Slurm itself requeues the job."""
    calls = []

    def stopped(flags: list[str]) -> int:
        with StopSignal():
            os.kill(os.getpid(), number)
        return STOPPED

    monkeypatch.setenv("SLURM_PROCID", rank)
    monkeypatch.setattr(main, "main", stopped)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command))
    monkeypatch.setattr(time, "sleep", lambda seconds: calls.append("sleep"))
    assert run_with_submitit.Task([])() == STOPPED
    assert calls == expected


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("status", [1, 2])
def test_an_error_fails_the_job(status, rank, on_slurm, monkeypatch):
    """A task that returns counts as completed, whatever it returns."""
    monkeypatch.setenv("SLURM_PROCID", rank)
    monkeypatch.setattr(main, "main", lambda flags: status)
    with pytest.raises(RuntimeError, match=str(status)):
        run_with_submitit.Task([])()


def test_two_local_tasks_are_stopped_and_a_job_in_this_process_continues(tmp_path, environment, capsys):
    """The signal comes to submitit's controller, which forwards it, as Slurm sends it to all tasks."""
    words = [*FLAGS, "--output_dir", str(tmp_path), "--epochs"]

    def stop() -> None:
        try:
            wait_for((tmp_path / "checkpoint_0000.pth").exists)
        finally:
            (submitted,) = (tmp_path / "submitit").glob("*_submitted.pkl")
            os.kill(int(submitted.name.partition("_")[0]), signal.SIGTERM)

    Thread(target=stop).start()
    assert run_with_submitit.main(["--cluster", "local", "--tasks-per-node", "2", *words, "1000"]) == STOPPED
    assert "the same command" in capsys.readouterr().out
    epochs = weights.load(tmp_path / "checkpoint.pth")["epoch"] + 2
    assert run_with_submitit.main(["--cluster", "debug", *words, str(epochs)]) == 0
    assert [line["epoch"] for line in log_of(tmp_path)] == list(range(epochs))


@pytest.mark.parametrize("results", [[1, 2], None])
def test_a_job_that_fails_says_why(results, tmp_path, capsys):
    """Where a process is ended with another one, submitit has no results."""
    (tmp_path / "7_1_log.err").write_text("a warning\nmain.py: error: --batch-size 2000: lower it\n")
    job = Mock(job_id="7", paths=SimpleNamespace(folder=tmp_path, stderr=tmp_path / "7_0_log.err"))
    job.results.configure_mock(**{"return_value": results} if results else {"side_effect": RuntimeError})
    assert run_with_submitit.wait(job) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run_with_submitit.py: error: ") and "--batch-size 2000" in line and str(tmp_path) in line


# a real Slurm

# more than a minute, so that the signal of --timeout 3 comes before the end
LONG = ["--epochs", "60", "--batch-size", "64"]


@pytest.fixture(scope="module")
def slurm():
    """Start two nodes on this machine, as root of a Debian, and return the environment that speaks to them."""
    base = Path(tempfile.mkdtemp(prefix="slurm"))
    # munge's folder must be open to all
    base.chmod(0o755)
    environment = os.environ | {"SLURM_BASE": str(base)}
    subprocess.run(["bash", str(ROOT / "tests" / "slurm_up.sh")], env=environment, check=True, timeout=600)
    environment |= {"SLURM_CONF": str(base / "slurm.conf"), "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    try:
        yield environment | {"OMP_NUM_THREADS": "1"}
    finally:
        subprocess.run(["bash", str(ROOT / "tests" / "slurm_down.sh")], env=environment, check=True, timeout=300)
        shutil.rmtree(base)


def call(slurm, *command: str) -> str:
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def slurm_submit(slurm, out: Path, *words: str) -> str:
    command = [sys.executable, str(ROOT / "run_with_submitit.py"), "--nodes", "2", "--tasks-per-node", "1"]
    command += ["--cpus-per-task", "1", *FLAGS, *words, "--output_dir", str(out)]
    return call(slurm, *command).split()[1].rstrip(":")


def wait_for_end(slurm, job: str, out: Path) -> dict[str, str]:
    """Return what Slurm says of a job once it is neither in the queue nor running."""
    end = time.monotonic() + 900
    while call(slurm, "squeue", "--noheader", "--jobs", job):
        assert time.monotonic() < end, read_logs(out)
        time.sleep(1)
    return dict(word.split("=", 1) for word in call(slurm, "scontrol", "show", "job", job).split() if "=" in word)


def read_logs(out: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted((out / "submitit").glob("*_log.*")))


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    job = wait_for_end(slurm, slurm_submit(slurm, out, *LONG), out)
    assert (job["JobState"], job["NumNodes"], job["Restarts"]) == ("COMPLETED", "2", "0"), read_logs(out)
    return out


@pytest.mark.slurm
@pytest.mark.parametrize("how", ["USR2", "requeue", "preemption", "time limit"])
def test_a_job_that_is_disturbed_ends_as_the_undisturbed_one(slurm, undisturbed, tmp_path, how):
    commands = {
        "USR2": "scancel --signal=USR2 JOB.0",
        "requeue": "scontrol requeue JOB",
        "preemption": "sbatch --partition=high --nodes=2 --exclusive --output=/dev/null --wrap=true",
    }
    out = tmp_path / "out"
    job = slurm_submit(slurm, out, *(["--timeout", "3"] if how == "time limit" else []), *LONG)
    wait_for((out / "checkpoint_0004.pth").exists)
    if how in commands:
        call(slurm, *commands[how].replace("JOB", job).split())
    ended = wait_for_end(slurm, job, out)
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) >= 1, (ended, read_logs(out))
    one, two = (weights.load(folder / "checkpoint.pth") | {"args": None} for folder in (undisturbed, out))
    assert differences(one, two) == [] and log_of(out) == log_of(undisturbed)


@pytest.mark.slurm
@pytest.mark.parametrize(("words", "state"), [("JOB", "CANCELLED"), ("--signal=KILL JOB.0", "FAILED")])
def test_a_cancelled_job_and_one_of_which_a_process_dies_are_not_requeued(slurm, tmp_path, words, state):
    out = tmp_path / "out"
    job = slurm_submit(slurm, out, "--epochs", "1000")
    wait_for((out / "checkpoint_0001.pth").exists)
    call(slurm, "scancel", *words.replace("JOB", job).split())
    ended = wait_for_end(slurm, job, out)
    assert (ended["JobState"], ended["Restarts"]) == (state, "0"), read_logs(out)


@pytest.mark.slurm
def test_a_job_that_is_cancelled_while_it_waits_never_runs(slurm, tmp_path):
    out = tmp_path / "out"
    job = slurm_submit(slurm, out, "--slurm", "hold")
    call(slurm, "scancel", job)
    ended = wait_for_end(slurm, job, out)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert not (out / "checkpoint.pth").exists()
