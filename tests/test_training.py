"""Training, evaluation and measurement, each against something independent of engine.py."""

import json
import math
import os
import pickle
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import terminated_at
from timm.utils import ModelEmaV3
from torch import nn

import compare
import datasets
import engine
import main
from losses import ImageLoss
from util import options
from util.checkpoint import TrainState
from util.config import AugmentConfig, DataConfig, ModelConfig
from util.errors import InputError, NonFiniteLossError
from util.log import RunLog
from util.precision import Precision, resolve_amp

CPU = torch.device("cpu")


def norm_free_model(classes: int = 5) -> nn.Module:
    """Return a model without batch statistics, so that a batch may be taken apart."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=classes
    )


def random_batches(count: int, size: int, classes: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, size, 3, 16, 16, generator=generator)
    targets = torch.randint(classes, (count, size), generator=generator)
    return list(zip(images, targets, strict=True))


def train(
    model: nn.Module,
    batches: list,
    ema: ModelEmaV3 | None = None,
    criterion=F.cross_entropy,
    precision: Precision | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    epoch: int = 0,
    **kwargs,
) -> dict[str, float]:
    """Train an epoch; its learning rate is constant."""
    precision = precision or Precision(CPU)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    config = ModelConfig("vit_tiny_patch16_224")
    updates = math.ceil(len(batches) / kwargs.get("accum_steps", 1))
    state = TrainState(model, ema, optimizer, None, precision.scaler, config, DataConfig(), (), {}, updates)
    state.epoch = epoch - 1
    more = {"prepare": precision.to_memory_format, "seed": 0, "run_log": RunLog(None)} | kwargs
    return engine.train_one_epoch(model, ImageLoss(criterion), batches, precision, state, **more)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_epoch_equals_a_hand_written_loop():
    batches = random_batches(5, 8)
    ours = norm_free_model()
    plain = norm_free_model()
    stats = train(ours, batches, clip_grad=0.5, print_freq=2)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(plain(x), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert torch.equal(weights(ours), weights(plain))
    assert stats["train_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert stats["train_lr"] == 1e-3


def test_accumulated_batches_equal_the_big_batch_and_those_left_over_make_an_update():
    small = random_batches(3, 4)
    big = [tuple(torch.cat(parts) for parts in zip(*small[:2], strict=True)), small[2]]
    made = []
    results = []
    for batches, accum_steps in ((small, 2), (big, 1)):
        model = norm_free_model()
        # unlike Adam, SGD does not blow up the rounding of tiny gradients
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.register_step_post_hook(lambda *_: made.append(1))
        train(model, batches, accum_steps=accum_steps, optimizer=optimizer)
        results.append(weights(model))
    assert len(made) == 2 + 2
    assert torch.allclose(*results, atol=1e-6)
    assert not torch.allclose(results[0], weights(norm_free_model()), atol=1e-4)


def test_every_update_draws_random_numbers_of_its_own_which_depend_on_epoch_and_update():
    drawn = []
    model = norm_free_model()
    model.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(1).item()))
    for epoch in (0, 1, 1):
        train(model, random_batches(3, 4), epoch=epoch)
    assert len(set(drawn)) == 6 and drawn[3:6] == drawn[6:]


def test_ema_follows_its_formula_over_weights_and_buffers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    ema = ModelEmaV3(model, decay=0.9)
    expected = {k: v.clone() for k, v in model.state_dict().items()}

    def follow(*_: object) -> None:
        for k, v in model.state_dict().items():
            expected[k] = v.clone() if "num_batches" in k else 0.9 * expected[k] + 0.1 * v

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.register_step_post_hook(follow)
    train(model, random_batches(4, 8), ema=ema, optimizer=optimizer)
    for k, v in ema.module.state_dict().items():
        assert torch.allclose(v, expected[k], atol=1e-6), k


def test_the_decay_of_an_ema_with_warmup_rises_over_all_epochs():
    """Updates are counted from 1; the first one replaces the initial weights."""
    model = norm_free_model()
    ema = ModelEmaV3(model, decay=0.7, use_warmup=True)
    expected = weights(model)
    updates = 0

    def follow(*_: object) -> None:
        nonlocal expected, updates
        updates += 1
        decay = min(0.7, 1 - updates ** (-2 / 3))
        expected = decay * expected + (1 - decay) * weights(model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.register_step_post_hook(follow)
    for epoch in range(2):
        train(model, random_batches(4, 8), ema=ema, optimizer=optimizer, epoch=epoch)
        torch.testing.assert_close(weights(ema.module), expected, rtol=0, atol=1e-6)
    assert updates == 8


@pytest.mark.parametrize("classes", [3, 12])
def test_evaluation_counts_every_image_once_and_names_the_k_of_top_k(classes):
    model = norm_free_model(classes).train()
    # evaluation leaves it out
    model.head_drop.p = 0.5
    batches = random_batches(2, 7, classes) + random_batches(1, 3, classes)
    result = engine.evaluate(model, batches, Precision(CPU), prepare=lambda images: images)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in batches])
    targets = torch.cat([y for _, y in batches])
    ranked = logits.argsort(dim=1, descending=True)
    top1 = sum(int(t == r[0]) for t, r in zip(targets, ranked, strict=True))
    topk = sum(int(t in r[: min(5, classes)]) for t, r in zip(targets, ranked, strict=True))
    assert result["count"] == 17 and result["topk"] == min(5, classes)
    assert result["acc1"] == pytest.approx(100 * top1 / 17)
    assert result["acc5"] == pytest.approx(100 * topk / 17)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits.double(), targets).item(), rel=1e-6)


def parse(*flags: str):
    return options.parse(["--data-set", "DIGITS", "--device", "cpu", *flags])


def run_state(*flags: str) -> TrainState:
    """Return the beginning of a run of a linear layer."""
    args = parse(*flags)
    more = {"data": DataConfig(), "classes": (), "updates_per_epoch": 1, "precision": Precision(CPU)}
    return main.build_state(args, model=nn.Linear(2, 2), config=ModelConfig("none", 4), **more)


def schedule(epochs: int, *flags: str) -> list[float]:
    state = run_state("--epochs", str(epochs), "--no-model-ema", *flags)
    rates = []
    for epoch in range(epochs):
        state.lr_scheduler.step(epoch)
        rates.append(state.optimizer.param_groups[0]["lr"])
    return rates


def test_rates_over_twenty_epochs_equal_the_published_schedule():
    """Five epochs of linear warm-up from --warmup-lr, then a half cosine to --min-lr, epoch e having schedule(e)."""
    peak = 5e-4 * 64 / 512
    expected = [1e-6 + e * (peak - 1e-6) / 5 for e in range(5)]
    expected += [1e-5 + 0.5 * (peak - 1e-5) * (1 + math.cos(math.pi * e / 20)) for e in range(5, 20)]
    assert schedule(20) == pytest.approx(expected, rel=1e-12)


def test_the_learning_rate_is_scaled_by_the_effective_batch_size():
    args = parse("--batch-size", "96", "--accum-steps", "4", "--lr", "1e-3")
    assert options.scale_lr(args, 2)[0] == pytest.approx(1e-3 * 768 / 512)


def test_criteria_are_the_published_ones():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.1], [1.0, 0.0, -0.5, 0.2]])
    labels = torch.tensor([2, 1])
    soft = torch.tensor([[0.2, 0.8, 0, 0], [0, 0, 0.5, 0.5]])
    onehot = torch.eye(4)[labels]
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    p = logits.sigmoid()
    hard = (soft > 0).float()
    unmixed = ["--mixup", "0", "--cutmix", "0"]
    minmax = [*unmixed, "--cutmix-minmax", ".2", ".8"]
    # flags, targets, the loss of an image by class, and whether images are mixed
    rows = [
        ([*unmixed, "--smoothing", "0.1"], labels, (0.9 * onehot + 0.025) * log_p, False),
        ([*unmixed, "--smoothing", "0"], labels, onehot * log_p, False),
        (["--mixup", "0"], soft, soft * log_p, True),
        (["--cutmix", "0"], soft, soft * log_p, True),
        (minmax, soft, soft * log_p, True),
        (["--bce-loss", "--smoothing", "0"], soft, (hard * p.log() + (1 - hard) * (1 - p).log()) / 4, True),
        (["--bce-loss", *unmixed], labels, (onehot * p.log() + (1 - onehot) * (1 - p).log()) / 4, False),
    ]
    for flags, targets, expected, mixed in rows:
        loss, mixup = main.build_loss_and_mixup(parse(*flags), run_state(), None, Precision(CPU), None)
        assert (mixup is not None) == mixed, flags
        assert loss(None, logits, targets).item() == pytest.approx(-expected.sum(1).mean().item()), flags


@pytest.mark.parametrize(
    "flags", ["", "--mixup 0 --cutmix 0", "--bce-loss --smoothing 0", "--bce-loss --mixup 0 --cutmix 0"]
)
def test_class_weights_multiply_what_a_class_adds_to_the_training_loss(flags):
    """Two, four and six images of three classes; the fourth has none."""
    labels = [0] * 2 + [1] * 4 + [2] * 6
    weights = torch.tensor([12 / (3 * 2), 12 / (3 * 4), 12 / (3 * 6), 0])
    args = parse("--class-weights", "balanced", *flags.split())
    loss, mixup = main.build_loss_and_mixup(args, run_state(), None, Precision(CPU), labels)
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    hard = torch.tensor([0, 2, 1, 2, 2])
    targets = torch.eye(4)[hard]
    if mixup:
        targets = 0.7 * targets + 0.3 * targets.flip(0)
    elif not args.bce_loss:
        targets = 0.9 * targets + 0.025
    if args.bce_loss:
        targets = (targets > 0).float()
        p = logits.sigmoid()
        expected = -(weights * targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    else:
        terms = -(weights * targets * logits.log_softmax(1)).sum(1)
        # torch's mean is over the weights of labels, and over images where targets are mixed
        expected = terms.sum() / (len(terms) if mixup else weights[hard].sum())
    assert loss(None, logits, targets if mixup else hard).item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(InputError, match="--class-weights balanced"):
        main.build_loss_and_mixup(args, run_state(), None, Precision(CPU), None)


class Spoiled(nn.Module):
    """A model whose output, or gradient, is multiplied by something not finite in one update."""

    def __init__(self, update: int, forward: float = 1.0, backward: float = 1.0) -> None:
        super().__init__()
        self.model = norm_free_model()
        self.update = update
        self.forward_factor = forward
        self.backward_factor = backward
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(weights(self.model))
        out = self.model(x)
        if len(self.seen) - 1 == self.update:
            out = out * self.forward_factor
            out.register_hook(lambda grad: grad * self.backward_factor)
        return out


def test_a_loss_that_is_not_finite_stops_with_where_and_what_to_try():
    model = Spoiled(update=5, forward=math.nan)
    with pytest.raises(NonFiniteLossError) as error:
        train(model, random_batches(12, 4), print_freq=4)
    text = str(error.value)
    assert "\n" not in text
    for part in ("loss is nan", "epoch 0", "lr 0.001", "gradient norm", "--clip-grad"):
        assert part in text, part
    assert len(model.seen) == 8  # the report after it, not the end of the epoch


def test_a_gradient_that_spoils_the_weights_in_the_last_update_is_not_saved():
    with pytest.raises(NonFiniteLossError, match="weights are no longer finite"):
        train(Spoiled(update=3, backward=math.inf), random_batches(4, 4))


def test_an_overflow_under_fp16_scaling_only_skips_its_update():
    model = Spoiled(update=2, backward=math.inf)
    precision = Precision(CPU, torch.float16)
    before = precision.scaler.get_scale()
    stats = train(model, random_batches(6, 4), precision=precision)
    assert precision.scaler.get_scale() < before and math.isfinite(stats["train_loss"])
    changes = [not torch.equal(a, b) for a, b in zip(model.seen, model.seen[1:], strict=False)]
    assert changes[2] is False and any(changes[3:])
    assert torch.isfinite(weights(model)).all()


def test_gradients_are_clipped_to_the_same_norm_under_fp16_scaling():
    before = weights(norm_free_model())
    steps = []
    for dtype in (None, torch.float16):
        model = norm_free_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, random_batches(1, 8), clip_grad=0.25, precision=Precision(CPU, dtype), optimizer=optimizer)
        steps.append(weights(model) - before)
    assert steps[0].norm().item() == pytest.approx(0.1 * 0.25, rel=1e-3)
    assert (steps[1] - steps[0]).norm() < 0.05 * steps[0].norm()


def test_an_epoch_of_accumulated_batches_under_fp16_continues_bit_for_bit(quick_flags, tmp_path):
    """The scale of the loss too, of which the updates since its last change are counted."""
    words = "--epochs 1 --no-repeated-aug --batch-size 4 --accum-steps 2 --amp fp16 --resume auto --output_dir"
    flags = [*quick_flags, *words.split()]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main.main([*flags, str(whole)]) == 0
    with terminated_at(3):
        assert main.main([*flags, str(stopped)]) == 75
    assert 0 < torch.load(stopped / "checkpoint.pth")["position"]["update"] < 6
    assert main.main([*flags, str(stopped)]) == 0
    expected, found = (torch.load(folder / "checkpoint.pth") for folder in (whole, stopped))
    for key in ("model", "model_ema", "scaler", "max_accuracy"):
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)
    losses = [json.loads((folder / "log.txt").read_text())["train_loss"] for folder in (whole, stopped)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_runs_the_model_in_it_and_the_loss_in_float32(dtype):
    seen = []
    model = norm_free_model()
    model.blocks[0].mlp.fc1.register_forward_hook(lambda m, i, o: seen.append(o.dtype))

    def loss(outputs, targets):
        seen.append(outputs.dtype)
        return F.cross_entropy(outputs, targets)

    train(model, random_batches(1, 4), precision=Precision(CPU, dtype), criterion=loss)
    assert seen == [dtype, torch.float32]


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"), [(False, False, "off"), (True, False, "bf16"), (False, True, "bf16")]
)
def test_precision_auto_is_bf16_on_a_cpu_that_computes_it(monkeypatch, capsys, avx512, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_amp("auto", CPU) == expected
    assert f"--amp {expected}: " in capsys.readouterr().out
    assert resolve_amp("fp16", CPU) == "fp16" and capsys.readouterr().out == ""


def test_benchmark_reports_repeats_and_leaves_the_model_alone():
    model = norm_free_model()
    before = weights(model)
    for mode in ("inference", "train"):
        more = {"train": mode == "train", "min_seconds": 0.01, "gmacs": 1.0}
        row = engine.benchmark(model, (16, 16), 4, Precision(CPU), **more)
        assert row["images_per_s"] == pytest.approx(4 / (row["ms_per_batch"] / 1000))
        assert row["spread"] >= 0 and row["matrix_gmacs_per_s"] > 0
    assert torch.equal(before, weights(model)) and all(p.grad is None for p in model.parameters())


def test_only_test_speed_needs_no_data_and_writes_only_what_is_asked_for(tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "benchmark", partial(engine.benchmark, min_seconds=0.01))
    flags = ["--only_test_speed", *tiny_flags, "--data-set", "IMNET", "--batch-size", "2"]
    assert main.main(flags) == 0 and list(tmp_path.iterdir()) == []
    assert main.main([*flags, "--output_dir", "."]) == 0 and os.listdir() == ["speed_macs.txt"]
    for text in (capsys.readouterr().out, Path("speed_macs.txt").read_text()):
        assert "GMACs" in text and "inference:" in text and "train:" in text


def test_a_run_leaves_what_the_spec_lists(tiny_run):
    line = json.loads((tiny_run / "log.txt").read_text())
    assert {"train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"} <= set(line)
    assert {"test_ema_loss", "test_ema_acc1", "test_ema_acc5"} <= set(line)
    content = torch.load(tiny_run / "checkpoint.pth")  # with torch's defaults: nothing but plain types
    assert {"model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args", "classes"} <= set(content)
    assert content["epoch"] == 0 and content["classes"] == list("0123456789") and type(content["args"]) is dict
    assert {"best_checkpoint.pth", "best_ema_checkpoint.pth", "curves.png"} <= set(os.listdir(tiny_run))
    args = json.loads((tiny_run / "args.json").read_text())
    assert args["versions"]["torch"] == torch.__version__ and args["versions"]["git"]
    assert args["effective_batch"] == args["batch_size"] and args["effective_lr"] > 0
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    expected = sum(tensor.numel() for name, tensor in content["model"].items() if not name.endswith(buffers))
    assert args["n_parameters"] == line["n_parameters"] == expected
    events = next((tiny_run / "runs").iterdir()).read_bytes()
    for tag, count in ((b"loss", 11), (b"lr", 11), (b"test_acc1", 1), (b"test_ema_acc1", 1)):
        # its length comes before a string
        assert events.count(bytes([len(tag)]) + tag) == count, tag
    assert not list(tiny_run.glob(".*")), "temporary files left over"


def test_without_output_dir_nothing_is_written_anywhere(quick_flags, tmp_path, monkeypatch, capsys):
    """Its warm-up does not end, which is said too."""
    monkeypatch.chdir(tmp_path)
    assert main.main([*quick_flags, "--epochs", "1", "--warmup-epochs", "5"]) == 0
    text = capsys.readouterr().out
    assert "nothing was saved" in text
    assert "--warmup-epochs 5: all 1 epochs are warm-up; lower it" in text
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_prints_and_that_its_last_line_evaluates_it(quick_flags, tmp_path, capsys):
    out = tmp_path / "out"
    assert main.main([*quick_flags, "--lr", "1e-2", "--eval-freq", "3", "--output_dir", str(out)]) == 0
    text = capsys.readouterr().out
    for part in ("48 distinct images", "on the 48 test images: ", "effective batch size 8 ", "EMA: Acc@1 "):
        assert part in text, part
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert ["test_acc1" in line for line in lines] == [False, True]  # --eval-freq 3, and the last epoch always

    command = text.strip().splitlines()[-1].partition("python main.py ")[2]
    assert command == f"--eval --resume {out / 'best_checkpoint.pth'}"
    assert main.main([*command.split(), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert f"* Acc@1 {lines[1]['test_acc1']:.3f} Acc@2 100.000 loss {lines[1]['test_loss']:.3f}" in text
    assert "raw weights" in text


def test_a_diverging_run_keeps_its_last_checkpoint_and_exits_with_1(quick_run, quick_flags, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(quick_run, out)
    before = (out / "checkpoint.pth").read_bytes()
    flags = [*quick_flags, "--output_dir", str(out), "--resume", "auto", "--lr", "1e9", "--unscale-lr"]
    assert main.main(flags) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("main.py: error: ") and "in epoch 1, update" in error
    assert (out / "checkpoint.pth").read_bytes() == before
    # one epoch is finished, and compare.py names the other one
    assert compare.main([str(out)]) == 0
    assert f"{out}: diverged in epoch 1" in capsys.readouterr().out


def test_what_is_sent_to_a_worker_that_is_not_forked_can_be_pickled(quick_flags):
    data = DataConfig("FOLDER", quick_flags[-1], num_workers=1)
    train_set = datasets.build_train_set(data, ModelConfig("", input_size=(32, 32)), AugmentConfig())
    loader = datasets.build_train_loader(train_set, data, batch_size=4, repeated_aug=True, seed=0)
    sent = loader.dataset, loader.collate_fn, loader.worker_init_fn
    received, *_ = pickle.loads(pickle.dumps(sent))
    keys = list(loader.sampler)[:2]
    torch.testing.assert_close(received.__getitems__(keys), loader.dataset.__getitems__(keys), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_run_with_workers_stops_and_ends_under_every_start_method(runner, method, quick_flags, tmp_path):
    """On macOS workers are spawned, and since Python 3.14 Linux has a fork server. They get the signal too."""
    flags = [*quick_flags, *"--epochs 1 --num_workers 1 --resume auto --output_dir".split(), str(tmp_path / "out")]
    kill = {"moment": "update: made", "count": 3, "signal": int(signal.SIGTERM), "rank": 0}
    for kill_, status in ((kill, 75), (None, 0)):
        result = runner(flags, tmp_path, kill=kill_, start_method=method)
        assert result["status"] == [status] and result["orphans"] == 0, result


def test_a_killed_worker_ends_the_run_and_is_named(quick_flags, monkeypatch, capsys):
    """As where the shared memory of a container is too small."""

    def killed(self, key):
        os.kill(os.getpid(), signal.SIGBUS)

    monkeypatch.setattr(datasets.SeededDataset, "__getitems__", killed)
    assert main.main([*quick_flags, "--num_workers", "1"]) == 1
    assert "DataLoader worker" in capsys.readouterr().err


def test_a_difference_from_training_is_said(tiny_run, capsys):
    resume = ["--eval", "--device", "cpu", "--resume", str(tiny_run / "checkpoint.pth")]
    assert main.main([*resume, "--input-size", "24"]) == 0
    assert "trained at 32x32, evaluating at 24x24" in capsys.readouterr().out
    assert main.main([*resume, "--model", "dhvt_small_cifar_patch2"]) == 2
    assert "it was trained with --model dhvt_tiny_cifar_patch4" in capsys.readouterr().err
