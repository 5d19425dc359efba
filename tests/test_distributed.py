"""Several processes: the same answers as one, and none of them hangs."""

import contextlib
import copy
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SMALL as TINY
from crash_runner import LAUNCHER as LAUNCHERS
from test_resume import log_of
from test_training import train
from timm.data import Mixup
from torch import nn

import main
from util import distributed
from util.errors import InputError, NonFiniteLossError

ROOT = Path(main.__file__).parent


def start(command: list[str], cwd: Path | None = None, **env: str) -> subprocess.Popen:
    """Start a command in a session of its own, so that all of its processes can be ended together."""
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHERS and not k.startswith("SLURM_")}
    clean |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | env
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=clean, cwd=cwd, start_new_session=True, **pipes)


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str, str]:
    """Return a process's exit status and what it printed, to stdout and to stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def torchrun(count: int, *flags: str, script: Path = ROOT / "main.py", cwd: Path | None = None) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", str(script)]
    return finish(start([*command, *flags], cwd))


def accuracies(text: str) -> list[tuple[float, float]]:
    """Return (accuracy, loss) of each evaluation printed, to three digits."""
    return [(float(a), float(b)) for a, b in re.findall(r"Acc@1 ([\d.]+) (?:Acc@\d [\d.]+ )?loss ([\d.]+)", text)]


def test_two_processes_train_evaluate_and_resume(runner, quick_flags, tmp_path, capsys):
    """The accuracy that they print, raw and EMA, is that of the file they saved, evaluated alone."""
    flags = [*quick_flags, *"--mixup 0 --cutmix 0 --aa none --reprob 0 --no-repeated-aug --batch-size 4".split()]
    flags += "--lr 5e-3 --unscale-lr --model-ema-decay 0.9".split()
    out = tmp_path / "out"
    for epochs in (1, 2):
        words = ["--output_dir", str(out), "--resume", "auto", "--epochs", str(epochs)]
        result = runner([*flags, *words], tmp_path, 2)
        assert result["status"] == [0, 0], result["err"]
        lines = log_of(out)
        assert [line["epoch"] for line in lines] == list(range(epochs))
    text = result["out"][0]
    assert "4 per process x 2 processes" in text and "SOPE's batch norms stay local" in text
    assert result["out"][1] == "" and result["err"] == ["", ""]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    assert not any(name.startswith("module.") for name in torch.load(out / "checkpoint.pth")["model"])
    for extra, key in (([], "test"), (["--use-ema"], "test_ema")):
        capsys.readouterr()
        assert main.main(["--eval", "--resume", str(out / "checkpoint.pth"), "--device", "cpu", *extra]) == 0
        ((accuracy, loss),) = accuracies(capsys.readouterr().out)
        assert accuracy == pytest.approx(lines[-1][f"{key}_acc1"], abs=6e-4)
        assert loss == pytest.approx(lines[-1][f"{key}_loss"], abs=6e-4)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_count_accuracy_and_loss_are_the_same_for_one_two_and_three_processes(runner, tree, tmp_path, amp):
    """One set does not divide by the processes; one is smaller than their number, so that a share is empty."""
    torch.manual_seed(1)
    model = timm.create_model("dhvt_tiny_cifar_patch4", num_classes=9, depth=1, embed_dim=32, num_heads=2)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    flags = [*TINY.split(), "--data-set", "FOLDER", "--batch-size", "2", "--nb-classes", "9", "--eval"]
    flags += ["--resume", str(tmp_path / "c.pth"), "--input-size", "32", "--amp", amp]
    for classes, count in ((("ant", "bee", "cow"), 7), (("ant", "bee"), 1)):
        root = tree(train=classes, count=count, side=40)
        printed = []
        for ranks in (1, 2, 3):
            result = runner([*flags, "--data-path", str(root)], tmp_path, ranks)
            assert result["status"] == [0] * ranks, result["err"]
            assert f"on the {count * len(classes)} test images" in result["out"][0]
            printed.append(accuracies(result["out"][0]))
        assert len(printed[0]) == 1 and printed[0] == printed[1] == printed[2]


def test_slurms_variables_make_a_run_of_two_processes(runner, quick_run, tmp_path):
    env = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "7"}
    ranks = [env | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    flags = ["--eval", "--device", "cpu", "--resume", str(quick_run / "checkpoint.pth")]
    result = runner(flags, tmp_path, 2, env=ranks)
    assert result["status"] == [0, 0], result["err"]
    first, second = result["out"]
    assert accuracies(first)[0][0] == pytest.approx(log_of(quick_run)[0]["test_acc1"], abs=6e-4) and second == ""


def forget_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*LAUNCHERS, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)


def world(monkeypatch: pytest.MonkeyPatch, **env: str) -> tuple[int, int, int, str | None, str | None]:
    """Return rank, local rank, number of processes, and the host and the port where they meet."""
    forget_launchers(monkeypatch)
    with monkeypatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        found = distributed.read_world()
        return *found, os.environ.pop("MASTER_ADDR", None), os.environ.pop("MASTER_PORT", None)


def test_who_is_alone_and_who_is_not(monkeypatch):
    step = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    torchruns = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
    for env, expected in (
        ({}, (0, 0, 1)),
        (torchruns, (3, 1, 4)),
        (step, (5, 1, 8)),
        (step | torchruns, (3, 1, 4)),
        (step | {"SLURM_STEP_NUM_TASKS": "1"}, (0, 0, 1)),  # srun --pty bash
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 0, 1)),  # a batch script, in no step of its own
    ):
        assert world(monkeypatch, **env)[:3] == expected, env
    with pytest.raises(InputError, match="WORLD_SIZE='many'"):
        world(monkeypatch, WORLD_SIZE="many")


def test_how_many_processes_share_a_machine(monkeypatch):
    forget_launchers(monkeypatch)
    step = {"SLURM_STEP_NUM_TASKS": "9", "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "4(x2),1"}
    torchruns = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    # a batch script that asked for two tasks per node, in which a step has four
    for env, expected in (({}, 1), (torchruns, 2), (step | {"SLURM_NTASKS_PER_NODE": "2"}, 4), (step | torchruns, 2)):
        with monkeypatch.context() as patch:
            # read_world sets them where they are not
            patch.setenv("MASTER_ADDR", "127.0.0.1")
            patch.setenv("MASTER_PORT", "0")
            for name, value in env.items():
                patch.setenv(name, value)
            assert distributed.local_world_size() == expected, env


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("gpu[003,005-9],m1", "gpu003"), ("a1,b2", "a1"), ("r[1-2]-ib,x", "r1-ib")],
)
def test_a_slurm_step_meets_at_its_first_host_and_a_requeued_one_at_another_port(monkeypatch, nodes, first):
    env = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "4711"}
    *_, host, port = world(monkeypatch, **env)
    *_, _, other_port = world(monkeypatch, **env, SLURM_RESTART_COUNT="1")
    assert host == first and port != other_port


def test_every_process_ends_when_the_input_is_bad(runner, quick_flags, tmp_path):
    """Where both find it, both name it; where only one can, the other does not wait for it."""
    result = runner([*quick_flags, "--data-path", str(tmp_path / "none")], tmp_path, 2)
    assert result["status"] == [2, 2]
    assert all("none/train: no such folder" in text for text in result["err"])

    # in this order rank 1 reads the second image
    root = shutil.copytree(quick_flags[-1], tmp_path / "data")
    bad = sorted((root / "val" / "ant").iterdir())[1]
    bad.write_bytes(b"")
    result = runner([*quick_flags, "--epochs", "1", "--data-path", str(root)], tmp_path, 2)
    assert result["status"] == [1, 2], result
    assert "main.py: error [rank 0]: lost another process" in result["err"][0]
    assert f"main.py: error [rank 1]: {bad}: not a readable image" in result["err"][1]


def accumulate(_: list[str]) -> int:
    """Be one of two processes: print when gradients are reduced, whether weights and loss are right, and the error."""
    device = distributed.init("cpu")
    rank = distributed.rank()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    alone = copy.deepcopy(net)
    ddp = distributed.wrap_ddp(net, device)
    everything = [(torch.randn(2, 3, 2, 2), torch.randint(4, (2,))) for _ in range(12)]
    batches = everything[rank::2]
    reduced = []
    ddp.register_forward_pre_hook(lambda module, _: reduced.append("-+"[module.require_backward_grad_sync]))
    stats = train(ddp, batches, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), accum_steps=3)

    # one process, with all six batches of an update as one
    joint = [tuple(map(torch.cat, zip(*part, strict=True))) for part in (everything[:6], everything[6:])]
    losses = []

    def criterion(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses.append(F.cross_entropy(outputs, targets))
        return losses[-1]

    train(alone, joint, criterion=criterion, optimizer=torch.optim.SGD(alone.parameters(), lr=0.1))
    same_loss = math.isclose(stats["train_loss"], sum(losses).item() / 2, rel_tol=1e-5)
    print("".join(reduced), torch.allclose(alone[1].weight, net[1].weight, atol=1e-6), same_loss)
    if rank == 1:
        batches[1] = (batches[1][0] * math.nan, batches[1][1])
    try:
        train(ddp, batches, print_freq=1)
    except NonFiniteLossError as error:
        print(error)
    del ddp
    distributed.shutdown()
    return 0


def test_accumulating_reduces_gradients_once_per_update_and_a_loss_that_is_not_finite_stops_all(runner, tmp_path):
    """Updates and loss of two processes equal those of their joint batches; then the loss is nan on one of them."""
    result = runner([], tmp_path, 2, call="test_distributed:accumulate")
    assert result["status"] == [0, 0], result["err"]
    for text in result["out"]:
        assert "--+--+ True True" in text and "the loss is nan in epoch 0, update 2 " in text


def draw(flags: list[str]) -> int:
    """Be one of two processes: train, and print a random number of NumPy and of torch where images are mixed."""
    mix = Mixup.__call__

    def draw_and_mix(self, images, targets):
        print("drawn:", np.random.random(), torch.rand(1).item())
        return mix(self, images, targets)

    Mixup.__call__ = draw_and_mix
    return main.main(flags)


def test_each_process_draws_random_numbers_of_its_own(runner, quick_flags, tmp_path):
    flags = [*quick_flags, "--epochs", "1", "--no-repeated-aug"]
    result = runner(flags, tmp_path, 2, call="test_distributed:draw")
    assert result["status"] == [0, 0], result["err"]
    drawn = [set(" ".join(re.findall("drawn: (.*)", text)).split()) for text in result["out"]]
    assert len(drawn[0]) == len(drawn[1]) == 2 * 3
    assert not drawn[0] & drawn[1]
