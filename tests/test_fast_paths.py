"""What makes a model faster changes no number: folded norm layers, checkpointing, torch.compile; and the benchmarks."""

import copy
import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import read_scalars
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.benchmark import Timer

import engine
import main
import speed_test
from tests.bench_reference import build_pair, count_saved, largest_difference
from tests.bench_reference import main as bench_reference
from util.precision import Precision

CPU = torch.device("cpu")
TINY = "dhvt_tiny_cifar_patch4"


def uneven(model: nn.Module) -> nn.Module:
    """Set statistics, scales and shifts of the batch norms that a wrong fold would show."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.5, 0.5, generator=generator)
    return model


@pytest.fixture
def model() -> nn.Module:
    return uneven(timm.create_model(TINY, depth=2)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [TINY, "dhvt_tiny_imagenet_patch16"])
def test_outputs_and_gradients_in_float32_are_the_references(name):
    ours, plain = build_pair(name, CPU)
    plain.load_state_dict(uneven(ours).state_dict())
    size = timm.get_pretrained_cfg(name).input_size[-1]
    torch.manual_seed(1)
    outputs, gradients = largest_difference(ours, plain, torch.randn(2, 3, size, size))
    assert outputs < 1e-5 and gradients < 1e-5
    for (key, buffer), expected in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-5, atol=1e-6, msg=key)


def test_folding_a_copy_removes_its_batch_norms_and_changes_no_output_and_no_gradient(model, images):
    before = copy.deepcopy(model.state_dict())
    folded = reparameterize_model(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(folded(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert torch.equal(reparameterize_model(folded)(images), folded(images))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    images.requires_grad_()
    found, expected = (torch.autograd.grad(each(images).square().sum(), images)[0] for each in (folded, model))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient_and_saves_memory(images):
    torch.manual_seed(0)
    model = timm.create_model(TINY, depth=2).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    kept = []
    for each in (model, twin):
        each.zero_grad()
        kept.append(count_saved(each, images, Precision(CPU)))
        F.cross_entropy(each(images), torch.tensor([1, 2, 3])).backward()
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=key)
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize(
    "model", ["resnet18_cifar --model-kwargs channels=(4,4,4,8)", f"{TINY} --model-kwargs depth=2"]
)
def test_running_statistics_see_each_batch_once_with_gradient_checkpointing(model, tree, tmp_path):
    words = f"--model {model} --input-size 32 --data-set FOLDER --data-path {tree(side=32)} --batch-size 4 --epochs 1"
    flags = "--warmup-epochs 0 --lr 1e-5 --drop-path 0 --accum-steps 2 --device cpu --num_workers 0"
    runs = []
    for more in ([], ["--grad-checkpointing"]):
        out = tmp_path / f"{len(more)}"
        assert main.main([*words.split(), *flags.split(), *more, "--output_dir", str(out)]) == 0
        runs.append(torch.load(out / "checkpoint.pth")["model"])
    plain, recomputed = runs
    for key, value in plain.items():
        if "running" in key or "tracked" in key:
            torch.testing.assert_close(recomputed[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_compiled_is_eager(model, images):
    """In one graph per mode, by aot_eager, which is quick: inductor's numbers are for a slow test."""
    compiled = copy.deepcopy(model)
    compiled.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)
    for each in (model, compiled):
        F.cross_entropy(each.train()(images), torch.tensor([1, 2, 3])).backward()
    for (key, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=key)
    assert list(compiled.state_dict()) == list(model.state_dict())


@pytest.fixture(scope="module")
def plain(quick_flags, tmp_path_factory) -> tuple[list[str], Path, dict[str, torch.Tensor]]:
    """Return flags of a run whose updates are large, the folder of that run and its initial weights."""
    folder = tmp_path_factory.mktemp("plain")
    more = "--epochs 1 --unscale-lr --lr 1e-2 --drop-path 0.2 --model-ema-decay 0.9"
    flags = [*quick_flags, *more.split(), *"--model-kwargs depth=2 embed_dim=32 num_heads=2".split()]
    initial = {}
    train = engine.train_one_epoch

    def record(model: nn.Module, *args, **kwargs) -> dict[str, float]:
        initial.update(copy.deepcopy(model.state_dict()))
        return train(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "train_one_epoch", record)
        assert main.main([*flags, "--output_dir", str(folder)]) == 0
    return flags, folder, initial


def flatten(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in weights.values() if weight.is_floating_point()])


def assert_same_run(folder: Path, expected: Path, initial: dict[str, torch.Tensor]) -> None:
    """Compare losses and weights, whose difference is small against the way that they went.

    Adam makes whole steps of gradients that are nothing but rounding, those before a batch norm: about 5e-3 in all.
    """
    losses = read_scalars(folder, "loss")
    torch.testing.assert_close(losses, read_scalars(expected, "loss"), rtol=0, atol=1e-3)
    found, plain = (torch.load(each / "checkpoint.pth") for each in (folder, expected))
    for part in ("model", "model_ema"):
        assert list(found[part]) == list(plain[part]) == list(initial)
        a, b, start = (flatten(each) for each in (found[part], plain[part], initial))
        assert (a - b).norm() < 2e-2 * (b - start).norm(), part


def test_a_run_with_speed_flags_is_the_run_without(plain, tmp_path):
    flags, *expected = plain
    assert main.main([*flags, "--channels-last", "--grad-checkpointing", "--output_dir", str(tmp_path)]) == 0
    assert_same_run(tmp_path, *expected)


@pytest.mark.slow
def test_a_compiled_run_is_like_the_eager_one_and_resumes_without(plain, tmp_path, capsys):
    flags, *expected = plain
    out = str(tmp_path)
    assert main.main([*flags, "--compile", "--output_dir", out]) == 0
    assert_same_run(tmp_path, *expected)
    assert main.main([*flags, "--epochs", "2", "--output_dir", out, "--resume", "auto"]) == 0
    flags = [*flags, "--eval", "--resume", f"{out}/checkpoint.pth"]
    assert main.main(flags) == 0
    eager = capsys.readouterr().out.splitlines()[-2:]
    assert main.main([*flags, "--compile"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == eager


def test_a_compiler_that_fails_is_one_line(tiny_flags, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, OSError("no C++ compiler"), "")

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    assert main.main([*tiny_flags, "--compile"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("main.py: error: torch.compile: ") and "leave out --compile" in line


def test_a_missing_compiler_is_one_line(tiny_flags, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/bin/false"))
    torch._dynamo.reset()
    assert main.main([*tiny_flags, "--compile"]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("main.py: error: torch.compile: ") and "compiler" in line


# measuring


@pytest.mark.parametrize(("calls", "steady"), [([1, 1, 9, 1, 1, 1], True), ([1, 2, 4, 8, 1, 2, 4, 8], False)])
def test_a_benchmark_says_whether_it_was_steady(calls, steady, monkeypatch):
    """On a clock that the calls move; torch's timer decides when to stop."""
    now = 0.0
    seconds = itertools.cycle(calls)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += next(seconds)
        return images

    model = nn.Flatten()
    monkeypatch.setattr(nn.Flatten, "forward", forward)
    monkeypatch.setattr(engine, "matrix_rate", lambda *_: 100.0)
    monkeypatch.setattr(engine, "Timer", partial(Timer, timer=lambda: now))
    found = engine.benchmark(model, (8, 8), 2, Precision(CPU), min_seconds=4, gmacs=1.0)
    assert found["steady"] == steady and (found["spread"] < 3) == steady


@pytest.mark.parametrize(("name", "gmacs"), [("deit_tiny_patch16_224", 1.26), ("cait_xxs24_224", 2.53)])
def test_macs_are_the_published_ones(name, gmacs):
    assert engine.count_macs(timm.create_model(name), (224, 224)) == pytest.approx(gmacs, rel=1e-2)


@pytest.mark.slow
def test_the_comparison_with_the_reference_runs(tmp_path, capsys):
    words = f"--model {TINY} --batch-size 1 --pairs 2 --device cpu --bf16 --json {tmp_path / 'b.json'}"
    assert bench_reference(words.split()) == 0
    out = capsys.readouterr().out
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["differences"][TINY]["outputs"] < 1e-5
    ways = [f"{model}, {precision}" for precision in ("float32", "bf16") for model in ("plain", "ours", "DeiT")]
    assert [row["way"] for row in written["rows"]] == [*ways, *ways]
    assert all(row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"] for row in written["rows"])
    assert written["rows"][0]["ratio"] == 1 and f"| {TINY} | inference | 1 | ours, float32 |" in out


def test_a_sweep_is_a_table_csv_json_and_a_picture(tmp_path, capsys):
    small = "patch_size=16,embed_dim=32,depth=1,num_heads=2"
    words = [f"deit_tiny_patch16_224:{small}", "resnet18:block=1", "--max-batch-size", "2", "--device", "cpu"]
    words += ["--input-size", "32", "--seconds", "0.01", "--output_dir", str(tmp_path), "--channels-last"]
    assert speed_test.main(words) == 0
    out = capsys.readouterr().out
    assert "of matrix rate" in out and "resnet18 block=1" in out and "failed (" in out
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(r["mode"], r["batch_size"]) for r in rows if "error" not in r] == [
        (mode, batch) for mode in ("inference", "train") for batch in (1, 2)
    ]
    assert len((tmp_path / "speed.csv").read_text().splitlines()) == 1 + len(rows)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_image_sizes_are_swept(tmp_path):
    words = [f"{TINY}:depth=1", "--image-sizes", "32", "64", "--batch-size", "2", "--mode", "inference"]
    assert speed_test.main([*words, "--device", "cpu", "--seconds", "0.01", "--output_dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["input_size"] for row in rows] == ["32x32", "64x64"]
    assert rows[1]["gmacs"] > 3 * rows[0]["gmacs"]


def test_what_does_not_fit_ends_a_sweep_and_not_the_table(monkeypatch, capsys):
    def measured(model, size, *, batch_size, **kwargs):
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"images_per_s": 1.0, "spread": 1.0, "steady": True, "share": 1.0}

    monkeypatch.setattr(engine, "benchmark", measured)
    words = ["resnet18", "resnet34", "--mode", "inference", "--input-size", "32", "--device", "cpu"]
    assert speed_test.main(words) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("resnet")]
    assert lines == ["resnet18"] * 3 + ["resnet34"] * 3


@pytest.mark.parametrize(
    "flags",
    [
        "--compile --grad-checkpointing",
        "--speed-batch-size 0 --only_test_speed",
        "--grad-checkpointing --model dla34 --model-kwargs --input-size 32",
    ],
)
def test_speed_flags_that_cannot_work_are_one_line(flags, tiny_flags, capsys):
    assert main.main([*tiny_flags, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and flags.split()[0] in error
