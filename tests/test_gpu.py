"""What only a CUDA device can show; skipped without one (see conftest.py)."""

import json
import os
import socket
import subprocess
import sys

import pytest
import timm
import torch
from crash_runner import LAUNCHER
from test_distributed import ROOT, accuracies, torchrun
from test_training import train
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import engine
import main
from tests import bench_reference
from util import distributed, optim
from util.precision import Precision, resolve_amp

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
TINY = "--model dhvt_tiny_cifar_patch4 --model-kwargs depth=2 embed_dim=64 num_heads=2 --device cuda --num_workers 2"
DIGITS = [*TINY.split(), "--data-set", "DIGITS", "--no-repeated-aug"]  # 22 updates per epoch


def tiny_model() -> torch.nn.Module:
    return timm.create_model("dhvt_tiny_cifar_patch4", depth=2, embed_dim=64, num_heads=2, num_classes=10).to(CUDA)


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
@pytest.mark.parametrize("data", ["digits", "folder"])
def test_training_learns_and_resumes_in_every_precision(tree, tmp_path, amp, data):
    words = f"{TINY} --data-set DIGITS --no-repeated-aug --mixup 0 --cutmix 0 --aa none"
    if data == "folder":
        words = f"{TINY} --model dhvt_tiny_imagenet_patch16 --data-set FOLDER --data-path {tree(count=24, side=200)}"
    words += f" --batch-size 8 --epochs 3 --warmup-epochs 0 --lr 3e-3 --unscale-lr --amp {amp} --output_dir {tmp_path}"
    flags = words.split()
    assert main.main(flags) == 0
    assert main.main([*flags, "--epochs", "4", "--resume", "auto"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    saved = torch.load(tmp_path / "checkpoint.pth")
    assert (saved["scaler"] is not None) == (amp == "fp16")
    assert all(v.dtype == torch.float32 for v in saved["model"].values() if v.is_floating_point())


@pytest.mark.parametrize("more", [[], ["--compile"], ["--opt", "sgd", "--amp", "fp16"], ["--model-ema-force-cpu"]])
def test_two_processes_on_one_gpu_train_and_their_checkpoint_evaluates_alike(tmp_path, capsys, more):
    words = [*DIGITS, "--epochs", "1", *more, "--output_dir", str(tmp_path)]
    status, text, error = torchrun(2, *words)
    assert status == 0, error
    assert main.main(["--eval", "--device", "cuda", "--resume", str(tmp_path / "checkpoint.pth")]) == 0
    (expected, _), _ = accuracies(text)  # raw weights, EMA
    ((accuracy, _),) = accuracies(capsys.readouterr().out)
    assert accuracy == expected


def test_an_error_of_one_process_ends_both(tmp_path):
    command = [sys.executable, "-c", "import sys, test_ranks; sys.exit(test_ranks.fail(sys.argv[1:]))", "bug"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in ("0", "1"):
        values = (rank, rank, "2", "2", "127.0.0.1", str(port))
        env = os.environ | dict(zip(LAUNCHER, values, strict=True))
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        words = [*command, *DIGITS, "--output_dir", str(tmp_path)]
        processes.append(subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert "ZeroDivisionError: a bug" in errors[0] and "lost another process" in errors[1]


def test_auto_precision_is_what_the_device_has():
    expected = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    assert resolve_amp("auto", CUDA) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_no_update_waits_for_the_device(dtype, monkeypatch):
    """Mixup, clipping, EMA and accumulation are on; only reading the losses, every --print-freq updates, may wait."""
    model = tiny_model()
    images = TensorDataset(torch.randn(96, 3, 32, 32), torch.randint(10, (96,)))

    def run() -> None:
        train(
            model,
            DataLoader(images, batch_size=8, pin_memory=True),
            ema=ModelEmaV3(model, 0.99),
            precision=Precision(CUDA, dtype),
            optimizer=optim.build_optimizer(model, CUDA, "adamw", lr=1e-3),
            prepare=lambda images: images.to(CUDA, non_blocking=True),
            accum_steps=2,
            clip_grad=1.0,
            mixup=Mixup(0.8, 1.0, num_classes=10),
            print_freq=3,
        )

    run()  # lazy initialisation may wait

    # From the second update of a report to its last one. The losses are summed over the processes when they are read.
    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1
        torch.cuda.set_sync_debug_mode("error" if made < 6 else "default")

    all_reduce = distributed.all_reduce

    def reading(tensor: torch.Tensor) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("default")
        return all_reduce(tensor)

    hook = register_optimizer_step_post_hook(count)
    monkeypatch.setattr(distributed, "all_reduce", reading)
    try:
        run()
    finally:
        hook.remove()
        torch.cuda.set_sync_debug_mode("default")
    assert made == 6


JOINT = """
import sys
sys.path.insert(0, sys.argv[1])
import timm, torch
import main
from util import distributed, options
from util.config import ModelConfig
from util.precision import Precision

device = distributed.init("cuda", "gloo")
args = options.parse(["--data-set", "DIGITS", "--model", "dhvt_tiny_cifar_patch4"])
config = ModelConfig(args.model, 10, (32, 32), {"depth": 1})
model = main.build_initial_model(args, config, Precision(device)).train()
alone = timm.create_model(args.model, depth=1, num_classes=10).to(device).train()
alone.load_state_dict(model.state_dict())
images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
model(images[distributed.rank() * 6 :][:6])
alone(images)
ours, joint = model.state_dict(), alone.state_dict()
stem = [k for k in ours if k.startswith("patch_embed") and "running" in k]
equal = all(torch.allclose(ours[k], joint[k], atol=1e-5) for k in stem)
daff = torch.allclose(ours["blocks.0.mlp.bn1.running_mean"], joint["blocks.0.mlp.bn1.running_mean"], atol=1e-7)
sys.stdout.write(f"STEM {len(stem)} {equal} DAFF {daff}\\n")
distributed.shutdown()
"""


def test_two_ranks_on_one_gpu_give_sopes_norms_the_joint_batchs_statistics(tmp_path):
    (tmp_path / "joint.py").write_text(JOINT)
    status, text, err = torchrun(2, str(ROOT), script=tmp_path / "joint.py")
    assert status == 0, err
    assert text.count("STEM 4 True DAFF False") == 2, text


def test_benchmark_measures_the_device():
    precision = Precision(CUDA, torch.bfloat16)
    row = engine.benchmark(tiny_model(), (32, 32), 32, precision, train=True, min_seconds=0.1, gmacs=0.1)
    assert row["images_per_s"] > 0
    assert 0 < row["peak_memory_mib"] < 20000


def test_fast_paths_are_the_references_on_the_device_and_keep_less_memory(tmp_path):
    words = "--model dhvt_tiny_imagenet_patch16 --pairs 2 --device cuda --json".split()
    assert bench_reference.main([*words, str(tmp_path / "b.json")]) == 0
    written = json.loads((tmp_path / "b.json").read_text())
    differences = written["differences"]["dhvt_tiny_imagenet_patch16"]
    assert differences["outputs"] < 5e-3 and differences["gradients"] < 5e-3  # cuDNN uses TensorFloat-32
    peak = {row["way"]: row["peak_memory_mib"] for row in written["rows"] if row["mode"] == "train"}
    assert peak["ours, bf16, compiled"] < 0.75 * peak["plain, fp16"]


def test_deterministic_runs_are_equal(tmp_path):
    """Each in a process of its own: cuBLAS reads its setting once."""
    for name in ("a", "b"):
        words = ["--epochs", "1", "--deterministic", "--output_dir", str(tmp_path / name)]
        status, _, error = torchrun(1, *DIGITS, *words)
        assert status == 0, error
    one, two = (torch.load(tmp_path / name / "checkpoint.pth") for name in ("a", "b"))
    for key in ("model", "model_ema"):
        assert all(torch.equal(a, b) for a, b in zip(one[key].values(), two[key].values(), strict=True))
