"""DHVT's fast paths give what the plain reference gives, keep less, and change nothing that people see."""

import copy
import itertools
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from plain_dhvt import DAFF as PlainDAFF
from timm.models import reparameterize_model
from torch import nn

import engine
import main
import models
import speed_test
from models.conv_norm import NormGELU
from tests.bench_reference import CASES, build_pair, count_saved, largest_difference
from tests.bench_reference import main as bench_reference
from util import measure
from util.precision import Precision

CPU = torch.device("cpu")
TINY = "dhvt_tiny_cifar_patch4"


def uneven(model: nn.Module) -> nn.Module:
    """Give the norms statistics, scales and shifts that a wrong fold would show."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.5, 0.5, generator=generator)
    return model


def folded_weights(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_buffers() if "folded" in name]


@pytest.fixture
def model() -> nn.Module:
    return uneven(timm.create_model(TINY, depth=2)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_in_float32_are_the_references(name):
    ours, plain = build_pair(name, CPU)
    plain.load_state_dict(uneven(ours).state_dict())
    size = timm.get_pretrained_cfg(name).input_size[-1]
    torch.manual_seed(1)
    outputs, gradients = largest_difference(ours, plain, torch.randn(2, 3, size, size))
    assert outputs < 1e-5 and gradients < 1e-5
    for (key, ours_), theirs in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-6, msg=key)


def test_less_is_kept_for_the_backward_pass():
    ours, plain = build_pair("dhvt_tiny_imagenet_patch16", CPU)
    images = torch.randn(2, 3, 224, 224)
    assert count_saved(ours, images, Precision(CPU)) < 0.8 * count_saved(plain, images, Precision(CPU))


def test_norm_gelu_has_the_gradients_of_its_parts():
    torch.manual_seed(0)
    y, residual = (torch.randn(3, 4, 2, 5, dtype=torch.double, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(4, dtype=torch.double, requires_grad=True) for _ in range(2))

    def run(y, residual, weight, bias):
        return NormGELU.apply(y, residual, weight, bias, torch.zeros(4).double(), torch.ones(4).double(), 0.1, 1e-5)

    assert torch.autograd.gradcheck(run, (y, residual, weight, bias))
    assert torch.autograd.gradcheck(lambda *args: run(args[0], None, *args[1:]), (y, weight, bias))


def test_folding_twice_is_folding_once_and_changes_no_output(model, images):
    with torch.no_grad():
        before = model(images)
        model.fold_norms()
        once = [b.clone() for _, b in model.named_buffers()]
        model.fold_norms()
        assert all(torch.equal(a, b) for a, (_, b) in zip(once, model.named_buffers(), strict=True))
        assert len(folded_weights(model)) == 2 * (2 + 3 * 2)
        torch.testing.assert_close(model(images), before, rtol=0, atol=1e-5 * before.abs().max().item())
        assert not torch.equal(model(images), before), "nothing was folded"


def test_folding_is_refused_in_training_mode(model):
    with pytest.raises(RuntimeError, match="eval"):
        model.train().fold_norms()
    assert folded_weights(model) == []


def test_checkpoints_of_a_folded_model_stay_unfolded(model):
    before = copy.deepcopy(model.state_dict())
    model.fold_norms()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    timm.create_model(TINY, depth=2).load_state_dict(after, strict=True)


@pytest.mark.parametrize("change", ["train", "load", "unfold"])
def test_a_folded_model_forgets_it_when_it_trains_or_loads(model, images, change):
    other = uneven(timm.create_model(TINY, depth=2)).eval()
    with torch.no_grad():
        expected = (other if change == "load" else model)(images)
        model.fold_norms()
        if change == "train":
            model.train().eval()
        elif change == "load":
            model.load_state_dict(other.state_dict())
        else:
            model.unfold_norms()
        assert folded_weights(model) == [] and torch.equal(model(images), expected)


@pytest.mark.parametrize(
    "move", [nn.Module.double, copy.deepcopy, lambda m: m.to("meta")], ids=["double", "copy", "meta"]
)
def test_folded_weights_follow_the_model(model, images, move):
    model.fold_norms()
    with torch.no_grad():
        expected = model(images)
        moved = move(model)
        tensors = [*moved.parameters(), *(b for b in moved.buffers() if b.is_floating_point())]
        assert {(t.dtype, t.device) for t in tensors} == {(tensors[0].dtype, tensors[0].device)}
        out = moved(images.to(tensors[0]))
    if out.device.type != "meta":
        torch.testing.assert_close(out.float(), expected)


def test_timms_reparameterisation_folds_a_copy(model, images):
    ready = reparameterize_model(model)
    assert folded_weights(ready) and folded_weights(model) == []
    with torch.no_grad():
        torch.testing.assert_close(ready(images), model(images), rtol=1e-4, atol=1e-5)


def test_folding_leaves_gradients_right(model, images):
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    model(inputs[0]).square().sum().backward()
    model.fold_norms()
    model(inputs[1]).square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-3, atol=1e-5)


def test_evaluation_folds_and_leaves_no_trace(model, images, monkeypatch):
    model = uneven(timm.create_model(TINY, depth=2))
    seen = []
    model.register_forward_hook(lambda *_: seen.append(len(folded_weights(model))))
    engine.evaluate(model, [(images, torch.zeros(3, dtype=torch.long))], Precision(CPU))
    assert seen == [16] and folded_weights(model) == []


def test_another_activation_is_kept(images):
    tokens = torch.randn(2, 17, 16)
    ours = models.dhvt.DAFF(16, 64, act_layer=nn.ReLU)
    ours.grid_size = (4, 4)
    plain = PlainDAFF(16)
    plain.load_state_dict(ours.state_dict())
    assert not torch.allclose(ours(tokens), plain(tokens, 4, 4))
    ours = models.dhvt.DAFF(16, 64)
    ours.grid_size = (4, 4)
    ours.load_state_dict(plain.state_dict())
    torch.testing.assert_close(ours(tokens), plain(tokens, 4, 4))


def test_statistics_see_a_batch_once_under_gradient_checkpointing(images):
    torch.manual_seed(0)
    model = timm.create_model(TINY, depth=2).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    kept = []
    for each in (model, twin):
        each.zero_grad()
        kept.append(count_saved(each, images, Precision(CPU)))
        F.cross_entropy(each(images), torch.tensor([1, 2, 3])).backward()
    for (key, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=key)
    assert twin.blocks[0].mlp.bn2.num_batches_tracked == 2
    assert twin.blocks[0].mlp.bn2.momentum == 0.1
    assert kept[1] < 0.6 * kept[0]


def test_compiled_is_eager(model, images):
    """In one graph a mode; by aot_eager, which is quick: inductor's numbers are a slow test's."""
    compiled = copy.deepcopy(model)
    compiled.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad(), measure.folded(compiled), measure.folded(model):
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)
    for each in (model, compiled):
        F.cross_entropy(each.train()(images), torch.tensor([1, 2, 3])).backward()
    for (key, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=key)
    for a, b in zip(model.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert list(compiled.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("flags", ["--channels-last", "--grad-checkpointing"])
def test_a_run_with_a_speed_flag_is_the_run_without(flags, tiny_flags, tiny_run, tmp_path):
    assert main.main([*tiny_flags, *flags.split(), "--output_dir", str(tmp_path / "out")]) == 0
    saved, plain = (torch.load(folder / "checkpoint.pth") for folder in (tmp_path / "out", tiny_run))
    assert list(saved["model"]) == list(plain["model"])
    for key, value in plain["model"].items():
        torch.testing.assert_close(saved["model"][key], value, rtol=1e-2, atol=2e-3, msg=key)
    assert saved["max_accuracy"] == pytest.approx(plain["max_accuracy"], abs=3)


@pytest.mark.slow
def test_a_compiled_run_is_like_the_eager_one_and_resumes_without(tiny_flags, tiny_run, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main.main([*tiny_flags, "--compile", "--output_dir", out]) == 0
    saved, plain = (torch.load(folder / "checkpoint.pth") for folder in (tmp_path / "out", tiny_run))
    for part in ("model", "model_ema"):
        assert list(saved[part]) == list(plain[part])
        for key, value in plain[part].items():
            torch.testing.assert_close(saved[part][key], value, rtol=1e-2, atol=2e-3, msg=key)
    assert main.main([*tiny_flags, "--epochs", "2", "--output_dir", out, "--resume", "auto"]) == 0
    flags = ["--eval", "--resume", f"{out}/checkpoint.pth"]
    assert main.main([*tiny_flags, *flags]) == 0
    eager = capsys.readouterr().out.splitlines()[-2:]
    assert main.main([*tiny_flags, *flags, "--compile"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == eager


def test_a_compiler_that_fails_is_one_line(tiny_flags, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, OSError("no C++ compiler"), "")

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    assert main.main([*tiny_flags, "--compile"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("main.py: error: --compile: ") and line.endswith("leave it out")


# measuring


def test_a_benchmark_goes_on_until_it_is_steady_or_time_is_up(monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    seconds = iter([0.1] * 3 + [0.1, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1] + [0.5] * 9)
    monkeypatch.setattr(measure, "_timed", lambda run, loops, device: next(seconds))
    monkeypatch.setattr(measure, "matrix_rate", lambda *_: 100.0)
    found = measure.benchmark(model, (8, 8), 2, Precision(CPU), min_seconds=0.1, gmacs=1.0)
    assert found["steady"] and found["spread"] == 0 and found["images_per_s"] == pytest.approx(20)
    assert len(list(seconds)) == 9  # the outlier cost five more repeats, and no more
    assert found["share"] == pytest.approx(100 * 20 / 100)
    uneasy, clock = itertools.chain([0.1] * 2, itertools.cycle([0.1, 0.2])), itertools.count()
    monkeypatch.setattr(measure, "_timed", lambda run, loops, device: next(uneasy))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    found = measure.benchmark(model, (8, 8), 2, Precision(CPU), min_seconds=0.1, max_seconds=3, gmacs=1.0)
    assert not found["steady"] and found["spread"] == pytest.approx(100)


class Unseen(nn.Module):
    """Attention that one of the two counters may overlook, and a product that the other may."""

    def forward(self, x):
        q = x.flatten(1)[:, None, None, :64].expand(-1, 1, 400, -1)
        return torch.cdist(q[:, 0], q[:, 0], compute_mode="use_mm_for_euclid_dist").mean((1, 2))


def test_counters_that_differ_are_said():
    with pytest.warns(UserWarning, match="GMACs by torchprofile, .* by torch's flop counter"):
        engine.count_macs(Unseen(), (16, 16))


@pytest.mark.parametrize(
    "name, gmacs",
    [
        ("deit_tiny_patch16_224", 1.26),
        ("deit_small_patch16_224", 4.6),
        ("deit_base_patch16_224", 17.6),
        ("cait_xxs24_224", None),  # torch's counter fails on it, and torchprofile counts it alone
        ("dhvt_tiny_imagenet_patch16", 1.362),
        ("dhvt_small_cifar_patch2", 6.215),
    ],
)
def test_torchs_flop_counter_agrees(name, gmacs):
    size = timm.get_pretrained_cfg(name).input_size[-2:]
    with torch.device("meta"):
        model = timm.create_model(name)
    found = measure.count_macs_on_meta(model, size)
    assert found is None if gmacs is None else found == pytest.approx(gmacs, rel=1e-2)


def test_the_comparison_with_the_reference_runs(tmp_path, capsys):
    words = [
        "--model",
        TINY,
        "--batch-size",
        "2",
        "--pairs",
        "2",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "b.json"),
    ]
    assert bench_reference(words) == 0
    out = capsys.readouterr().out
    assert "inference" in out and "train" in out and "kept for backward" in out
    (row,) = json.loads((tmp_path / "b.json").read_text())
    assert row["train"]["ratio"] > 0 and row["saved_bytes"]["ratio"] < 0.9 and row["output_difference"] < 1e-5


def test_a_sweep_is_a_table_csv_json_and_a_picture(tmp_path, capsys):
    small = "patch_size=16,embed_dim=32,depth=1,num_heads=2"
    words = [f"deit_tiny_patch16_224:{small}", "resnet18:block=1", "--max-batch-size", "2", "--device", "cpu"]
    words += ["--input-size", "32", "--seconds", "0.01", "--output_dir", str(tmp_path), "--channels-last"]
    assert speed_test.main(words) == 0
    out = capsys.readouterr().out
    assert "of matrix rate" in out and "resnet18 block=1: failed (" in out
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(r["mode"], r["batch_size"]) for r in rows if "error" not in r] == [
        (mode, batch) for mode in ("inference", "train") for batch in (1, 2)
    ]
    assert len((tmp_path / "speed.csv").read_text().splitlines()) == 1 + len(rows) == 6
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_image_sizes_are_swept(tmp_path, capsys):
    words = [f"{TINY}:depth=1", "--image-sizes", "32", "64", "--batch-size", "2", "--mode", "inference"]
    assert speed_test.main([*words, "--device", "cpu", "--seconds", "0.01", "--output_dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["input_size"] for row in rows] == ["32x32", "64x64"]
    assert rows[1]["gmacs"] > 3 * rows[0]["gmacs"]


def test_what_does_not_fit_ends_a_sweep_and_not_the_table(monkeypatch, capsys):
    def measured(model, size, batch, *args, **kwargs):
        if batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"images_per_s": 1.0, "spread": 1.0, "steady": True, "share": 1.0}

    monkeypatch.setattr(speed_test.engine, "benchmark", measured)
    assert (
        speed_test.main(["resnet18", "resnet34", "--mode", "inference", "--input-size", "32", "--device", "cpu"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["resnet18"] * 3 + ["resnet34"] * 3
    assert lines[2].endswith("failed (batch 4 does not fit)")


def test_the_default_models_exist():
    assert len(speed_test.find_models(speed_test.MODELS)) == len(speed_test.MODELS)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--compile --grad-checkpointing", "give one"),
        ("--speed-batch-size 4", "--only_test_speed"),
        ("--only_test_speed --speed-batch-size 0", "at least 1"),
        ("--grad-checkpointing --model dla34 --model-kwargs --input-size 32", "--grad-checkpointing"),
    ],
)
def test_speed_flags_that_cannot_work_are_one_line(flags, words, tiny_flags, capsys):
    assert main.main([*tiny_flags, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
