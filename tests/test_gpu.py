"""What only a CUDA device can show; skipped without one (see conftest.py)."""

import json
import os
import signal

import pytest
import torch
from test_distributed import ROOT, torchrun
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, TensorDataset

import builders
import engine
import main
from losses import ImageLoss
from tests import bench_reference
from util import options

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
TINY = "--model dhvt_tiny_cifar_patch4 --model-kwargs depth=2 embed_dim=64 num_heads=2 --device cuda --num_workers 2"


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
@pytest.mark.parametrize("data", ["digits", "folder"])
def test_training_learns_and_resumes_in_every_precision(tree, tmp_path, amp, data):
    flags = [*TINY.split(), "--amp", amp, "--epochs", "3", "--warmup-epochs", "0", "--lr", "3e-3", "--unscale-lr"]
    if data == "digits":
        flags += ["--data-set", "DIGITS", "--no-repeated-aug", "--mixup", "0", "--cutmix", "0", "--aa", "none"]
    else:
        flags += ["--data-set", "FOLDER", "--data-path", str(tree(count=24, side=40)), "--batch-size", "8"]
    out = tmp_path / "out"
    assert main.main([*flags, "--output_dir", str(out)]) == 0
    assert main.main([*flags, "--output_dir", str(out), "--epochs", "4", "--resume", "auto"]) == 0
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    saved = torch.load(out / "checkpoint.pth")
    assert (saved["scaler"] is not None) == (amp == "fp16")
    assert all(v.dtype == torch.float32 for k, v in saved["model"].items() if v.is_floating_point())


def test_auto_precision_is_what_the_device_has():
    expected = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    assert builders.find_amp_dtype("auto", CUDA) is expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_no_step_waits_for_the_device(dtype, monkeypatch):
    """Mixup, clipping, EMA and accumulation on; only the reading of the losses, every --print-freq steps, may wait."""
    args = options.parse([*TINY.split(), "--data-set", "DIGITS", "--clip-grad", "1", "--drop-path", "0.1"])
    model = builders.build_model(args, 10, (32, 32)).to(CUDA)
    optimizer, _, _ = builders.build_optimization(args, model, CUDA)
    criterion, mixup = builders.build_criterion(args, 10)
    ema = ModelEmaV3(model, 0.99)
    images = TensorDataset(torch.randn(96, 3, 32, 32), torch.randint(10, (96,)))
    loader = DataLoader(images, batch_size=8, pin_memory=True)
    read = engine.LossWatch.read

    def reading(watch):
        torch.cuda.set_sync_debug_mode("default")
        losses = read(watch)
        if watch.updates < 6:
            torch.cuda.set_sync_debug_mode("error")
        return losses

    def run():
        step = engine.StepOptions(accum_steps=2, clip_grad=1.0, mixup=mixup, print_freq=3)
        engine.train_one_epoch(
            model, ImageLoss(criterion), loader, optimizer, engine.Precision(CUDA, dtype), 0, step, ema
        )

    run()  # lazy initialisation may wait
    monkeypatch.setattr(engine.LossWatch, "read", reading)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


JOINT = """
import sys
sys.path.insert(0, sys.argv[1])
import timm, torch
import builders
from util import distributed

device = distributed.init("cuda", "gloo")
build = lambda: timm.create_model("dhvt_tiny_cifar_patch4", depth=1)
torch.manual_seed(0)
model = build()
alone = build()
alone.load_state_dict(model.state_dict())
model, alone = builders.synchronise_stem(model, device).to(device).train(), alone.to(device).train()
images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
model(images[distributed.rank() * 6 :][:6])
alone(images)
ours, theirs = model.state_dict(), alone.state_dict()
stem = [k for k in ours if k.startswith("patch_embed") and "running" in k]
equal = all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in stem)
daff = torch.allclose(ours["blocks.0.mlp.bn1.running_mean"], theirs["blocks.0.mlp.bn1.running_mean"], atol=1e-7)
sys.stdout.write(f"STEM {len(stem)} {equal} DAFF {daff}\\n")
distributed.shutdown()
"""


def test_two_ranks_on_one_gpu_give_sopes_norms_the_joint_batchs_statistics(tmp_path):
    (tmp_path / "joint.py").write_text(JOINT)
    status, text, err = torchrun(2, str(ROOT), script=tmp_path / "joint.py")
    assert status == 0, err
    assert text.count("STEM 4 True DAFF False") == 2, text


def test_benchmark_measures_the_device():
    args = options.parse([*TINY.split(), "--data-set", "DIGITS"])
    model = builders.build_model(args, 10, (32, 32)).to(CUDA)
    for train in (False, True):
        found = engine.benchmark(model, (32, 32), 32, engine.Precision(CUDA, torch.bfloat16), train, min_seconds=0.1)
        assert found["images_per_s"] > 0 and found["device"] == torch.cuda.get_device_name(0)
        assert 0 < found["peak_memory_mib"] < 20000


def test_fast_paths_are_the_references_on_the_device():
    ours, plain = bench_reference.build_pair("dhvt_tiny_imagenet_patch16", CUDA)
    outputs, gradients = bench_reference.largest_difference(ours, plain, torch.randn(4, 3, 224, 224, device=CUDA))
    assert outputs < 5e-3 and gradients < 5e-3  # cuDNN convolves in TensorFloat-32


def test_the_best_setting_keeps_less_memory_than_the_published_one(tmp_path):
    words = [
        "--model",
        "dhvt_tiny_imagenet_patch16",
        "--pairs",
        "2",
        "--compile",
        "--channels-last",
        "--device",
        "cuda",
    ]
    assert bench_reference.main([*words, "--json", str(tmp_path / "b.json")]) == 0
    (row,) = json.loads((tmp_path / "b.json").read_text())
    assert row["train"]["peak_memory_ratio"] < 0.75 and row["inference"]["share"] > 0


def test_deterministic_runs_are_equal(tmp_path):
    """Each in a process of its own: cuBLAS reads its setting once."""
    flags = [*TINY.split(), "--data-set", "DIGITS", "--no-repeated-aug", "--epochs", "1", "--deterministic"]
    for name in ("a", "b"):
        status, _, error = torchrun(1, *flags, "--output_dir", str(tmp_path / name))
        assert status == 0, error
    one, two = (torch.load(tmp_path / name / "checkpoint.pth") for name in ("a", "b"))
    for key in ("model", "model_ema"):
        assert all(torch.equal(a, b) for a, b in zip(one[key].values(), two[key].values(), strict=True))


def test_a_run_goes_on_from_the_step_a_signal_came_in(tmp_path, monkeypatch):
    flags = [*TINY.split(), "--data-set", "DIGITS", "--no-repeated-aug", "--epochs", "2", "--output_dir", str(tmp_path)]
    add, made = engine.LossWatch.add, []

    def count(*args) -> None:
        made.append(1)
        if len(made) == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine.LossWatch, "add", count)
        assert main.main(flags) == 75
    saved = torch.load(tmp_path / "checkpoint.pth")
    assert saved["position"]["update"] == 30 - 22 and "device" in saved["position"]["ranks"][0]
    assert main.main([*flags, "--resume", "auto"]) == 0
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1]
