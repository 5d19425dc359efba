"""Several processes: the same answers as one, and none of them hangs."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import main
from util import distributed
from util.errors import InputError

ROOT = Path(main.__file__).parent
TINY = "--model dhvt_tiny_cifar_patch4 --model-kwargs depth=1 embed_dim=32 num_heads=2 --device cpu --num_workers 0"
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start(command: list[str], cwd: Path | None = None, **env: str) -> subprocess.Popen:
    """Start a command in a session of its own, so that all of its processes can be ended together."""
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHERS and not k.startswith("SLURM_")}
    clean |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | env
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=clean, cwd=cwd, start_new_session=True, **pipes)


def finish(process: subprocess.Popen, seconds: float = 150) -> tuple[int, str, str]:
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
    """Find (accuracy, loss) of each evaluation printed."""
    return [(float(a), float(b)) for a, b in re.findall(r"Acc@1 ([\d.]+) (?:Acc@\d [\d.]+ )?loss ([\d.]+)", text)]


def test_two_processes_train_evaluate_and_resume_the_digits(tmp_path, capsys):
    """The accuracy that they print, raw and EMA, is that of the file they saved, evaluated alone."""
    flags = [*TINY.split(), *"--data-set DIGITS --no-repeated-aug --batch-size 64 --warmup-epochs 0".split()]
    flags += "--mixup 0 --cutmix 0 --aa none --lr 5e-3 --unscale-lr --model-ema-decay 0.999".split()
    out = tmp_path / "out"
    for epochs in (1, 2):
        last = ["--epochs", str(epochs), "--output_dir", str(out), "--resume", "auto"]
        status, text, err = torchrun(2, *flags, *last)
        assert status == 0, err
        lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == list(range(epochs))
        for extra, key in (([], "test"), (["--use-ema"], "test_ema")):
            capsys.readouterr()
            assert main.main([*flags, "--eval", "--resume", str(out / "checkpoint.pth"), *extra]) == 0
            ((accuracy, loss),) = accuracies(capsys.readouterr().out)
            assert accuracy == pytest.approx(lines[-1][f"{key}_acc1"], abs=6e-4)
            assert loss == pytest.approx(lines[-1][f"{key}_loss"], abs=6e-4)
    assert "64 a process x 2 process(es)" in text and "SOPE's batch norms stay local" in text
    assert "Traceback" not in err and "destroy_process_group" not in err
    assert lines[1]["train_loss"] < lines[0]["train_loss"] < 2.6


def test_uneven_jpegs_train_at_64_pixels_with_classes_from_the_data(tree, tmp_path):
    """Three classes, 5 validation images a class: the shares are uneven, and top-5 becomes top-3."""
    root = tree(train=("ant", "bee", "cow"), count=5, side=70)
    flags = [*TINY.split(), "--data-set", "FOLDER", "--data-path", str(root), "--input-size", "64", "--epochs", "1"]
    status, text, err = torchrun(2, *flags, "--batch-size", "2", "--output_dir", str(tmp_path / "out"))
    assert status == 0, err
    assert "Acc@3" in text and "on the 15 test images" in text
    saved = torch.load(tmp_path / "out" / "checkpoint.pth")
    assert saved["classes"] == ["ant", "bee", "cow"] and saved["model"]["head.weight"].shape[0] == 3
    assert not any(k.startswith("module.") for k in saved["model"])


SPOKEN = """
import sys
sys.path.insert(0, sys.argv[1])
import engine, main
from util import distributed, options

evaluate = engine.evaluate

def spoken(*args):
    found = evaluate(*args)
    distributed.print0("EXACT", found["count"], found["acc1"], found["acc5"], found["loss"])
    return found

engine.evaluate = spoken
device = distributed.init("cpu")
for root in sys.argv[2:4]:
    main.run(options.parse([*sys.argv[4:], "--data-path", root]), device)
distributed.shutdown()
"""


def test_count_accuracy_and_loss_are_the_same_for_one_two_and_three_processes(tree, tmp_path):
    """One set does not divide by the processes; one is smaller than their number, so that a share is empty."""
    roots = [
        str(tree(train=("ant", "bee", "cow"), count=7, side=40)),
        str(tree(train=("ant", "bee"), count=1, side=40)),
    ]
    torch.manual_seed(1)
    model = timm.create_model("dhvt_tiny_cifar_patch4", num_classes=9, depth=1, embed_dim=32, num_heads=2)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    (tmp_path / "exact.py").write_text(SPOKEN)
    flags = [*TINY.split(), "--data-set", "FOLDER", "--batch-size", "2", "--nb-classes", "9"]
    flags += ["--eval", "--resume", str(tmp_path / "c.pth")]
    found = []
    for count in (1, 2, 3):
        status, text, err = torchrun(count, str(ROOT), *roots, *flags, script=tmp_path / "exact.py")
        assert status == 0, err
        found.append([[float(x) for x in line.split()] for line in re.findall(r"EXACT (.*)", text)])
    assert [sizes[0] for sizes in found[0]] == [21, 2]
    for others in found[1:]:
        for alone, other in zip(found[0], others, strict=True):
            assert other[:3] == alone[:3] and other[3] == pytest.approx(alone[3], rel=1e-6)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_slurms_variables_make_a_run_of_two_processes(tiny_run):
    flags = [*TINY.split(), "--data-set", "DIGITS", "--eval", "--resume", str(tiny_run / "checkpoint.pth")]
    env = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "7"}
    env["MASTER_PORT"] = str(free_port())
    both = [
        start([sys.executable, str(ROOT / "main.py"), *flags], **env, SLURM_PROCID=str(r), SLURM_LOCALID=str(r))
        for r in range(2)
    ]
    (s0, first, e0), (s1, second, e1) = (finish(p) for p in both)
    assert (s0, s1) == (0, 0), e0 + e1
    expected = json.loads((tiny_run / "log.txt").read_text().splitlines()[0])["test_acc1"]
    assert accuracies(first)[0][0] == pytest.approx(expected, abs=6e-4) and second == ""


def test_who_is_alone_and_who_is_not(monkeypatch):
    for name in [*LAUNCHERS, *(k for k in os.environ if k.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)

    def world(**env: str):
        with monkeypatch.context() as m:
            for name in ("MASTER_ADDR", "MASTER_PORT"):
                m.setenv(name, "kept")
            for name, value in env.items():
                m.setenv(name, value)
            return distributed.find_world()

    alone = (0, 0, 1)
    assert world() == alone
    assert world(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0") == alone
    assert world(WORLD_SIZE="4", RANK="3", LOCAL_RANK="1") == (3, 1, 4)
    assert world(SLURM_PROCID="0", SLURM_NTASKS="1") == alone
    assert world(SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="1") == alone  # srun --pty bash
    assert world(SLURM_NTASKS="8") == alone  # in no step at all
    assert world(SLURM_PROCID="5", SLURM_NTASKS="8", SLURM_LOCALID="1") == (5, 1, 8)
    assert world(SLURM_PROCID="5", SLURM_NTASKS="8", WORLD_SIZE="2", RANK="1", LOCAL_RANK="1") == (1, 1, 2)
    with pytest.raises(InputError, match="WORLD_SIZE='many'"):
        world(WORLD_SIZE="many")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[3-7]", "n3"), ("gpu[003,005-9],m1", "gpu003"), ("a1,b2", "a1"), ("r[1-2]-ib,x", "r1-ib")],
)
def test_the_first_host_of_a_slurm_node_list(nodes, first):
    assert distributed._first_host(nodes) == first


def test_a_requeued_job_meets_at_another_port(monkeypatch):
    ports = set()
    for restart in ("0", "1", "2"):
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        monkeypatch.delenv("MASTER_PORT", raising=False)
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        distributed._slurm_rendezvous()
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 3


def test_every_process_ends_when_the_input_is_bad(tmp_path):
    status, _, err = torchrun(2, *TINY.split(), "--data-set", "FOLDER", "--data-path", str(tmp_path / "none"))
    lines = [line for line in err.splitlines() if "main.py: error" in line]
    assert status != 0 and lines and all("none/train: no such folder" in line for line in lines)


WORKER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import engine
from losses import ImageLoss
from torch.nn import functional as F
from util import distributed

device = distributed.init("cpu")
rank = distributed.rank()
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
ddp = distributed.wrap_ddp(net, device)
g = torch.Generator().manual_seed(5)
everything = [(torch.randn(2, 3, 2, 2, generator=g), torch.randint(4, (2,), generator=g)) for _ in range(12)]
mode = sys.argv[2]
batches = everything[rank::2]
if mode == "nan" and rank == 1:
    batches[3] = (batches[3][0] * float("nan"), batches[3][1])
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
options = engine.StepOptions(accum_steps=3, print_freq=1)
reduced = []
ddp.register_forward_pre_hook(lambda module, _: reduced.append("-+"[module.require_backward_grad_sync]))
engine.train_one_epoch(ddp, ImageLoss(F.cross_entropy), batches, optimizer, engine.Precision(device), 0, options)
alone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
torch.manual_seed(0)
alone[1].reset_parameters()
optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
for i in range(2):
    x, y = (torch.cat([b[k] for b in everything[6 * i : 6 * i + 6]]) for k in (0, 1))
    optimizer.zero_grad()
    F.cross_entropy(alone(x), y).backward()
    optimizer.step()
equal = torch.allclose(alone[1].weight, net[1].weight, atol=1e-6)
sys.stdout.write(f"REDUCED {''.join(reduced)} EQUAL {equal}\\n")
del ddp
distributed.shutdown()
"""


def test_accumulating_reduces_gradients_once_an_update_and_equals_the_joint_batch(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    status, text, err = torchrun(2, str(ROOT), "equal", script=tmp_path / "worker.py")
    assert status == 0, err
    assert text.count("REDUCED --+--+ EQUAL True") == 2, text


def test_a_loss_that_is_not_finite_on_one_process_stops_all(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    status, text, err = torchrun(2, str(ROOT), "nan", script=tmp_path / "worker.py")
    assert status != 0 and "EQUAL" not in text
    assert "loss is nan in epoch 0, step 1" in err
