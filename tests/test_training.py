"""Training, evaluation and measurement, each against something independent of engine.py."""

import json
import math
import os
import signal
import struct

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from tensorboardX.proto import event_pb2
from timm.utils import ModelEmaV3
from torch import nn

import builders
import datasets
import engine
import main
from losses import ImageLoss
from util import options, report
from util.errors import NonFiniteLossError

CPU = torch.device("cpu")


class Batches(list):
    """A loader of given batches."""


def norm_free_model(classes: int = 5) -> nn.Module:
    """Build a model without batch statistics, so that a batch may be taken apart."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=classes
    )


def random_batches(count: int, size: int, classes: int = 5) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return Batches(
        (
            torch.randn(size, 3, 16, 16, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(count)
    )


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)


def sgd(parameters):
    """Build an optimizer that, unlike Adam, does not blow the rounding of tiny gradients up."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def train(model, batches, ema=None, criterion=F.cross_entropy, precision=None, optimizer=adamw, **options_):
    optimizer = optimizer(model.parameters())
    precision = precision or engine.Precision(CPU)
    stats = engine.train_one_epoch(
        model, ImageLoss(criterion), batches, optimizer, precision, 0, engine.StepOptions(**options_), ema
    )
    return stats, optimizer


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_epoch_equals_a_hand_written_loop():
    batches, ours, theirs = random_batches(5, 8), norm_free_model(), norm_free_model()
    stats, _ = train(ours, batches, clip_grad=0.5, print_freq=2)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(theirs(x), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert torch.equal(weights(ours), weights(theirs))
    assert stats["train_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert stats["train_lr"] == 1e-3


def test_accumulated_batches_equal_the_big_batch():
    small = random_batches(4, 4)
    big = Batches(
        (torch.cat([small[i][0], small[i + 1][0]]), torch.cat([small[i][1], small[i + 1][1]])) for i in (0, 2)
    )
    one, two = norm_free_model(), norm_free_model()
    train(one, small, accum_steps=2, optimizer=sgd)
    train(two, big, optimizer=sgd)
    assert torch.allclose(weights(one), weights(two), atol=1e-6)
    assert not torch.allclose(weights(one), weights(norm_free_model()), atol=1e-4)


def test_batches_left_over_still_make_an_update_of_their_own_mean():
    batches = random_batches(3, 4)
    one, two = norm_free_model(), norm_free_model()
    steps = []

    def counting(parameters):
        optimizer = sgd(parameters)
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        return optimizer

    train(one, batches, accum_steps=2, optimizer=counting)
    assert len(steps) == 2
    big = Batches([(torch.cat([batches[0][0], batches[1][0]]), torch.cat([batches[0][1], batches[1][1]])), batches[2]])
    train(two, big, optimizer=sgd)
    assert torch.allclose(weights(one), weights(two), atol=1e-6)


def test_ema_follows_its_formula_over_weights_and_buffers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    ema = ModelEmaV3(model, decay=0.9)
    expected = {k: v.clone() for k, v in model.state_dict().items()}

    class Recording(Batches):
        def __iter__(self):
            for i, batch in enumerate(list.__iter__(self)):
                if i:
                    follow()
                yield batch

    def follow():
        for k, v in model.state_dict().items():
            expected[k] = v.clone() if "num_batches" in k else 0.9 * expected[k] + 0.1 * v

    train(model, Recording(random_batches(4, 8)), ema=ema)
    follow()
    for k, v in ema.module.state_dict().items():
        assert torch.allclose(v, expected[k], atol=1e-6), k


@pytest.mark.parametrize("classes", [3, 5, 12])
def test_evaluation_counts_every_sample_once_and_names_the_k_of_top_k(classes):
    model = norm_free_model(classes).eval()
    batches = random_batches(2, 7, classes) + random_batches(1, 3, classes)
    found = engine.evaluate(model, batches, engine.Precision(CPU))
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in batches])
    targets = torch.cat([y for _, y in batches])
    ranked = logits.argsort(dim=1, descending=True)
    top1 = sum(int(t == r[0]) for t, r in zip(targets, ranked, strict=True))
    topk = sum(int(t in r[: min(5, classes)]) for t, r in zip(targets, ranked, strict=True))
    assert found["count"] == 17 and found["topk"] == min(5, classes)
    assert found["acc1"] == pytest.approx(100 * top1 / 17) and found["acc5"] == pytest.approx(100 * topk / 17)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits.double(), targets).item(), rel=1e-6)


def schedule(flags: list[str], epochs: int) -> list[float]:
    args = options.parse(["--data-set", "DIGITS", "--epochs", str(epochs), *flags])
    optimizer, scheduler, _ = builders.build_optimization(args, nn.Linear(2, 2), CPU)
    rates = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_rates_over_twenty_epochs_equal_the_published_schedule():
    """Five epochs of linear warm-up from --warmup-lr, then a half cosine to --min-lr, epoch e having schedule(e)."""
    peak = 5e-4 * 64 / 512
    expected = [1e-6 + e * (peak - 1e-6) / 5 for e in range(5)]
    expected += [1e-5 + 0.5 * (peak - 1e-5) * (1 + math.cos(math.pi * e / 20)) for e in range(5, 20)]
    assert schedule([], 20) == pytest.approx(expected, rel=1e-12)


def test_other_schedules_and_unscaled_rates():
    flags = ["--lr", "1e-2", "--unscale-lr", "--warmup-epochs", "0"]
    steps = schedule([*flags, "--sched", "step", "--decay-epochs", "3", "--decay-rate", "0.5"], 7)
    assert steps == pytest.approx([1e-2] * 3 + [5e-3] * 3 + [2.5e-3])
    assert schedule([*flags, "--sched", "constant"], 4) == pytest.approx([1e-2] * 4)
    poly = schedule([*flags, "--sched", "poly", "--decay-rate", "1", "--min-lr", "0"], 4)
    assert poly == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    noisy = [*flags, "--sched", "constant", "--lr-noise", "0.5"]
    first, again = schedule(noisy, 6), schedule(noisy, 6)
    assert first == again and first[:3] == pytest.approx([1e-2] * 3) and first[4:] != pytest.approx([1e-2] * 2)


def test_effective_rate_is_scaled_by_the_whole_batch():
    args = options.parse(["--data-set", "DIGITS", "--batch-size", "96", "--accum-steps", "4", "--lr", "1e-3"])
    _, _, found = builders.build_optimization(args, nn.Linear(2, 2), CPU)
    assert found["effective_batch"] == 384 and found["effective_lr"] == pytest.approx(1e-3 * 384 / 512)


def criterion(*flags: str):
    return builders.build_criterion(options.parse(["--data-set", "DIGITS", *flags]), 4)


def test_criteria_are_the_published_ones():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.1], [1.0, 0.0, -0.5, 0.2]])
    labels, soft = torch.tensor([2, 1]), torch.tensor([[0.2, 0.8, 0, 0], [0, 0, 0.5, 0.5]])
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    onehot = torch.eye(4)[labels]

    loss, mixup = criterion("--mixup", "0", "--cutmix", "0", "--smoothing", "0.1")
    assert mixup is None
    assert loss(logits, labels).item() == pytest.approx(-((0.9 * onehot + 0.025) * log_p).sum(1).mean().item())
    loss, _ = criterion("--mixup", "0", "--cutmix", "0", "--smoothing", "0")
    assert loss(logits, labels).item() == pytest.approx(-(onehot * log_p).sum(1).mean().item())
    for flags in (
        [],
        ["--mixup", "0"],
        ["--cutmix", "0"],
        ["--mixup", "0", "--cutmix", "0", "--cutmix-minmax", ".2", ".8"],
    ):
        loss, mixup = criterion(*flags)
        assert mixup is not None
        assert loss(logits, soft).item() == pytest.approx(-(soft * log_p).sum(1).mean().item())
    loss, _ = criterion("--bce-loss", "--smoothing", "0")
    hard, p = (soft > 0).float(), logits.sigmoid()
    assert loss(logits, soft).item() == pytest.approx(-(hard * p.log() + (1 - hard) * (1 - p).log()).mean().item())
    loss, _ = criterion("--bce-loss", "--mixup", "0", "--cutmix", "0")
    assert loss(logits, labels).item() == pytest.approx(
        -(onehot * p.log() + (1 - onehot) * (1 - p).log()).mean().item()
    )


def test_cutmix_alone_mixes_by_area_and_mixup_alone_by_weight():
    x, y = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]), torch.tensor([0, 1])
    np.random.seed(3)
    mixed, target = criterion("--mixup", "0", "--smoothing", "0")[1](x.clone(), y)
    assert set(mixed.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(mixed.mean(dim=(1, 2, 3)), target[:, 1])
    mixed, target = criterion("--cutmix", "0", "--smoothing", "0")[1](x.clone(), y)
    assert len(mixed[0].unique()) == 1 and torch.allclose(mixed[:, 0, 0, 0], target[:, 1])


class Spoiled(nn.Module):
    """A model whose output, or gradient, is not finite in one step."""

    def __init__(self, model: nn.Module, step: int, forward: float = 1.0, backward: float = 1.0) -> None:
        super().__init__()
        self.model, self.bad, self.forward_, self.backward_ = model, step, forward, backward
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        self.seen.append(weights(self.model).clone())
        out = self.model(x)
        if len(self.seen) - 1 == self.bad:
            out = out * self.forward_
            if self.backward_ != 1.0:
                out.register_hook(lambda g: g * self.backward_)
        return out


def test_a_loss_that_is_not_finite_stops_with_where_and_what_to_try():
    model = Spoiled(norm_free_model(), step=5, forward=float("nan"))
    with pytest.raises(NonFiniteLossError) as error:
        train(model, random_batches(12, 4), print_freq=4)
    text = str(error.value)
    assert "\n" not in text
    for part in (
        "loss is nan",
        "epoch 0",
        "step 5",
        "lr 0.001",
        "loss scale 1",
        "gradient norm",
        "--clip-grad",
        "--amp",
    ):
        assert part in text, part
    assert len(model.seen) == 8  # the report after it, not the end of the epoch


def test_a_gradient_that_spoils_the_weights_in_the_last_step_is_not_saved():
    model = Spoiled(norm_free_model(), step=3, backward=float("inf"))
    with pytest.raises(NonFiniteLossError, match="weights are no longer finite"):
        train(model, random_batches(4, 4))


def test_an_overflow_under_fp16_scaling_only_skips_its_step():
    model = Spoiled(norm_free_model(), step=2, backward=float("inf"))
    precision = engine.Precision(CPU, torch.float16)
    before = precision.scaler.get_scale()
    stats, _ = train(model, random_batches(6, 4), precision=precision)
    assert precision.scaler.get_scale() < before and math.isfinite(stats["train_loss"])
    steps = [not torch.equal(a, b) for a, b in zip(model.seen, model.seen[1:], strict=False)]
    assert steps[2] is False and any(steps[3:])
    assert torch.isfinite(weights(model)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_runs_the_model_in_it_and_the_loss_in_float32(dtype):
    seen = []
    model = norm_free_model()
    model.blocks[0].mlp.fc1.register_forward_hook(lambda m, i, o: seen.append(o.dtype))

    def loss(outputs, targets):
        seen.append(outputs.dtype)
        return F.cross_entropy(outputs, targets)

    train(model, random_batches(1, 4), precision=engine.Precision(CPU, dtype), criterion=loss)
    assert seen == [dtype, torch.float32]


def test_precision_auto_is_off_on_the_cpu():
    assert builders.find_amp_dtype("auto", CPU) is None
    assert builders.find_amp_dtype("bf16", CPU) is torch.bfloat16


def test_benchmark_reports_repeats_and_leaves_the_model_alone():
    model = norm_free_model()
    before = weights(model)
    for train_ in (False, True):
        found = engine.benchmark(model, (16, 16), 4, engine.Precision(CPU), train=train_, min_seconds=0.02)
        assert found["images_per_s"] == pytest.approx(4 / (found["ms_per_batch"] / 1000))
        assert found["spread"] >= 0 and found["peak_memory_mib"] > 10
        assert (found["mode"], found["batch_size"]) == ("train" if train_ else "inference", 4)
    assert torch.equal(before, weights(model)) and all(p.grad is None for p in model.parameters())


def test_only_test_speed_needs_no_data_and_writes_nothing_unless_told(tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "benchmark", quick_benchmark)
    flags = ["--only_test_speed", *tiny_flags, "--data-set", "IMNET", "--batch-size", "2"]
    assert main.main(flags) == 0
    out = capsys.readouterr().out
    assert "GMACs" in out and "inference:" in out and "train:" in out
    assert list(tmp_path.iterdir()) == []
    assert main.main([*flags, "--output_dir", "out"]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["speed_macs.txt"]
    assert "GMACs" in (tmp_path / "out" / "speed_macs.txt").read_text()


benchmark = engine.benchmark


def quick_benchmark(*args, **kwargs):
    return benchmark(*args, **kwargs, min_seconds=0.01)


def read_events(path):
    """Yield (tag, step, value) from a TensorBoard file: records of length, checksum, event, checksum."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length
        for value in event.summary.value:
            yield value.tag, event.step, value.simple_value


def test_a_run_leaves_what_the_spec_lists(tiny_run):
    (line,) = [json.loads(text) for text in (tiny_run / "log.txt").read_text().splitlines()]
    assert {"train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"} <= set(line)
    assert {"test_ema_loss", "test_ema_acc1", "test_ema_acc5"} <= set(line)
    content = torch.load(tiny_run / "checkpoint.pth")  # with torch's defaults: nothing but plain types
    assert {"model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args", "classes"} <= set(content)
    assert content["epoch"] == 0 and content["classes"] == list("0123456789") and type(content["args"]) is dict
    assert (tiny_run / "best_checkpoint.pth").is_file()
    assert (tiny_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tiny_run / "args.json").read_text())
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"]
    assert record["effective_batch"] == record["batch_size"] and record["effective_lr"] > 0
    assert record["n_parameters"] == line["n_parameters"] and len(record["versions"]["git"]) >= 7
    events = list(read_events(next((tiny_run / "runs").iterdir())))
    tags = {tag for tag, _, _ in events}
    assert tags == {"loss", "lr", "test_acc1", "test_acc5"}
    losses = [(step, value) for tag, step, value in events if tag == "loss"]
    assert [step for step, _ in losses] == list(range(len(losses))) and len(losses) > 5
    assert np.mean([v for _, v in losses]) == pytest.approx(line["train_loss"], rel=1e-4)
    assert not list(tiny_run.glob(".*")), "temporary files left over"


def test_without_output_dir_nothing_is_written_anywhere(tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main([*tiny_flags, "--epochs", "1"]) == 0
    assert "nothing was saved" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_prints(tiny_flags, tmp_path, capsys):
    out = tmp_path / "out"
    assert main.main([*tiny_flags, "--epochs", "2", "--eval-freq", "3", "--output_dir", str(out)]) == 0
    text = capsys.readouterr().out
    for part in (
        "number of params: ",
        "effective batch ",
        "distinct images",
        "* Acc@1 ",
        " Acc@5 ",
        "Accuracy of the network on the 360 test images: ",
        "Max accuracy: ",
        "images_per_s",
        "EMA: ",
        f"in {out / 'best_checkpoint.pth'}; evaluate it with: python main.py --eval --resume",
    ):
        assert part in text, part
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert ["test_acc1" in line for line in lines] == [False, True]  # --eval-freq 3, and the last epoch always


def test_the_command_that_is_printed_at_the_end_gives_the_logged_accuracy(tiny_flags, tmp_path, capsys):
    out = tmp_path / "out"
    assert main.main([*tiny_flags, "--epochs", "2", "--output_dir", str(out)]) == 0
    text = capsys.readouterr().out
    flags = text.strip().splitlines()[-1].partition("python main.py ")[2].split()
    assert main.main([*flags, "--device", "cpu"]) == 0
    again = capsys.readouterr().out
    best = max(json.loads(line)["test_acc1"] for line in (out / "log.txt").read_text().splitlines())
    assert f"* Acc@1 {best:.3f} " in again and "raw weights" in again


def test_a_diverging_run_keeps_its_last_checkpoint_and_exits_with_1(tiny_flags, tmp_path, capsys):
    out = tmp_path / "out"
    assert main.main([*tiny_flags, "--epochs", "1", "--output_dir", str(out)]) == 0
    before = (out / "checkpoint.pth").read_bytes()
    flags = [*tiny_flags, "--epochs", "2", "--output_dir", str(out), "--resume", "auto", "--warmup-epochs", "0"]
    assert main.main([*flags, "--opt", "adamw", "--lr", "1e38", "--unscale-lr"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("main.py: error: ") and "in epoch 1, step" in error and len(error.splitlines()) == 1
    assert (out / "checkpoint.pth").read_bytes() == before


def test_two_runs_with_one_seed_are_equal_and_with_another_are_not(tiny_flags, tmp_path):
    def run(name: str, seed: int, workers: int):
        flags = [*tiny_flags, "--epochs", "1", "--mixup", "0.8", "--seed", str(seed), "--num_workers", str(workers)]
        assert main.main([*flags, "--aa", "rand-m9-mstd0.5-inc1", "--output_dir", str(tmp_path / name)]) == 0
        return torch.load(tmp_path / name / "checkpoint.pth")["model"]

    one, two, other = run("a", 0, 0), run("b", 0, 2), run("c", 1, 0)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_dropout_flag_reaches_the_blocks_not_the_classifier():
    args = options.parse(["--data-set", "DIGITS", "--model", "dhvt_tiny_cifar_patch4", "--drop", "0.3"])
    model = builders.build_model(args, 10, (32, 32))
    assert {b.attn.proj_drop.p for b in model.blocks} == {0.3} and model.head_drop.p == 0.0


@pytest.mark.parametrize(("model", "size"), [("resnet10t", (48, 64)), ("deit_tiny_patch16_224", (48, 64))])
def test_any_timm_model_takes_the_input_size(model, size):
    args = options.parse(["--data-set", "DIGITS", "--model", model, "--input-size", *map(str, size)])
    assert builders.find_input_size(args) == size
    assert builders.build_model(args, 7, size).eval()(torch.zeros(1, 3, *size)).shape == (1, 7)


def test_a_killed_worker_is_one_line_with_a_hint(tiny_flags, monkeypatch, capsys):
    """As where the shared memory of a container is too small."""

    def killed(self, key):
        os.kill(os.getpid(), signal.SIGBUS)

    monkeypatch.setattr(datasets.Seeded, "__getitems__", killed)
    assert main.main([*tiny_flags, "--num_workers", "1"]) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("main.py: error")]
    assert "DataLoader worker" in line and "--shm-size" in line


def test_what_may_surprise_is_said(tiny_run, tiny_flags, tmp_path, capsys):
    """A warm-up that does not end; an evaluation at another size; weights of another model."""
    assert main.main([*tiny_flags, "--epochs", "2", "--warmup-epochs", "5", "--lr", "1e-3"]) == 0
    assert (
        "The rate only warms up, from 1e-06: --warmup-epochs 5 are not fewer than --epochs 2" in capsys.readouterr().out
    )
    assert main.main(tiny_flags) == 0
    assert "warms up" not in capsys.readouterr().out
    saved = torch.load(tiny_run / "checkpoint.pth")
    saved["args"]["input_size"] = [24]
    torch.save(saved, tmp_path / "c.pth")
    assert main.main([*tiny_flags, "--eval", "--resume", str(tmp_path / "c.pth")]) == 0
    assert "c.pth: trained at 24x24 pixels; --input-size takes that" in capsys.readouterr().out
    words = ["--eval", "--resume", str(tmp_path / "c.pth"), "--model", "dhvt_small_cifar_patch2"]
    assert main.main([*tiny_flags, *words, "--model-kwargs"]) == 2
    assert "; it is of --model dhvt_tiny_cifar_patch4" in capsys.readouterr().err
    words = ["--finetune", str(tmp_path / "c.pth"), "--model-kwargs", "depth=2", "embed_dim=32", "num_heads=2"]
    assert main.main([*tiny_flags, *words]) == 0
    assert "tensors before the head start untrained: is it of another --model?" in capsys.readouterr().out
