"""Distillation: the published loss, a teacher that nothing moves, and runs that keep no trace of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from test_distributed import torchrun
from timm.data import Mixup
from torch import nn

import engine
import main
from losses import DistillationLoss, ImageLoss
from models.build import load_teacher
from util import weights
from util.config import ModelConfig
from util.precision import Precision

GOLDEN = json.loads((Path(__file__).parent / "golden" / "deit_helpers.json").read_text())["distillation"]
LABELS = torch.tensor([1, 2, 3, 9])
STUDENT = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 2}
RUN = (
    "--model deit_tiny_distilled_patch16_224 --input-size 32 --data-set DIGITS --device cpu --num_workers 0 "
    "--no-repeated-aug --aa none --batch-size 128 --epochs 1 --warmup-epochs 0 --model-ema-decay 0.9 --lr 1e-3 "
    "--unscale-lr --teacher-model test_resnet --model-kwargs"
).split() + [f"{k}={v}" for k, v in STUDENT.items()]


def build_student() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=10, **STUDENT)


def build_teacher() -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model("test_resnet", num_classes=10)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a teacher's checkpoint, saved from several processes, with batch statistics of its own."""
    teacher = build_teacher()
    with torch.no_grad():
        teacher.train()(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": {f"module.{k}": v for k, v in teacher.state_dict().items()}, "epoch": 7}, path)
    return path


class Says(nn.Module):
    """A teacher that says the same whatever it sees."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits


def golden_inputs() -> list[torch.Tensor]:
    """Give the class head's, the distillation head's and the teacher's logits, each 4, 10."""
    random = np.random.RandomState(5)
    return [torch.tensor(random.standard_normal((4, 10))) for _ in range(3)]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['type']}-{c['alpha']}-{c['tau']}")
def test_the_loss_is_the_published_one(case):
    head, distilled, says = golden_inputs()
    if case["type"] == "none":
        loss = ImageLoss(F.cross_entropy)(None, head, LABELS)
    else:
        criterion = DistillationLoss(F.cross_entropy, Says(says), case["type"], case["alpha"], case["tau"])
        loss = criterion(None, (head, distilled), LABELS)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(case["loss"], rel=2e-6)


@pytest.mark.parametrize(("kind", "tau"), [("hard", 1.0), ("soft", 1.0), ("soft", 3.0)])
def test_gradients_reach_both_heads_and_never_the_teacher(kind, tau):
    head, distilled, says = (x.float().requires_grad_() for x in golden_inputs())
    teacher, alpha = Says(says.detach().clone()), 0.3
    DistillationLoss(F.cross_entropy, teacher, kind, alpha, tau)(None, (head, distilled), LABELS).backward()
    assert teacher.logits.grad is None and not teacher.logits.requires_grad
    onehot = torch.eye(10)
    assert torch.allclose(head.grad, (1 - alpha) * (head.softmax(1) - onehot[LABELS]) / 4, atol=1e-7)
    if kind == "hard":
        expected = alpha * (distilled.softmax(1) - onehot[says.argmax(1)]) / 4
    else:
        expected = alpha * tau * ((distilled / tau).softmax(1) - (says / tau).softmax(1)) / 40
    assert torch.allclose(distilled.grad, expected, atol=1e-7)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_without_a_share_of_the_teacher_the_loss_is_the_plain_one(kind):
    head, distilled, says = golden_inputs()
    found = DistillationLoss(F.cross_entropy, Says(says), kind, 0.0, 2.0)(None, (head, distilled), LABELS)
    assert found.item() == ImageLoss(F.cross_entropy)(None, head, LABELS).item()


def test_outputs_of_one_head_and_other_kinds_are_refused():
    head, _, says = golden_inputs()
    with pytest.raises(TypeError, match="set_distilled_training"):  # two images: one tensor would unpack
        DistillationLoss(F.cross_entropy, Says(says[:2]), "hard", 0.5, 1.0)(None, head[:2], LABELS[:2])
    with pytest.raises(ValueError, match="not none"):
        DistillationLoss(F.cross_entropy, Says(says), "none", 0.5, 1.0)


def test_the_teacher_sees_the_mixed_images_in_eval_mode_and_in_the_precision_of_the_run():
    student, teacher = build_student(), build_teacher()
    student.set_distilled_training(True)
    precision = Precision(torch.device("cpu"), torch.bfloat16)
    criterion = DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", 0.5, 2.0, precision.autocast).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    shown = []

    def watch(module, inputs, output):
        shown.append(inputs[0].clone())
        assert not module.training and not any(m.training for m in module.modules())
        assert not torch.is_grad_enabled() and output.dtype == torch.bfloat16

    teacher.register_forward_hook(watch)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mixed, targets = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)(images.clone(), LABELS)
    engine.backward(student.train(), criterion, mixed, targets, precision, 1.0, None, True)
    assert len(shown) == 1 and torch.equal(shown[0], mixed) and not torch.equal(mixed, images)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert student.head.weight.grad.any() and student.head_dist.weight.grad.any()


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_run_trains_the_student_alone_and_resumes(kind, teacher_file, tmp_path, capsys):
    """Mixed images, bf16, an average of the weights, accumulated batches; the teacher stays as its file has it."""
    flags = [*RUN, "--distillation-type", kind, "--distillation-tau", "2", "--teacher-path", str(teacher_file)]
    flags += ["--amp", "bf16", "--accum-steps", "2", "--mixup", "0.8", "--cutmix", "1.0"]
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert main.main([*flags, "--epochs", "2", "--output_dir", str(once)]) == 0
    text = capsys.readouterr().out
    assert text.count("Teacher test_resnet, 373658 parameters") == 1
    again = ["--epochs", "2", "--output_dir", str(twice), "--resume", str(once / "checkpoint_0000.pth")]
    assert main.main([*flags, *again]) == 0

    saved, resumed = torch.load(once / "checkpoint.pth"), torch.load(twice / "checkpoint.pth")
    assert resumed["epoch"] == 1
    for key in ("model", "model_ema"):
        build_student().load_state_dict(saved[key], strict=True)
        assert all(torch.equal(v, resumed[key][k]) for k, v in saved[key].items())
    assert sum(len(g["params"]) for g in saved["optimizer"]["param_groups"]) == len(list(build_student().parameters()))
    original = weights.get_weights(torch.load(teacher_file), teacher_file)
    assert not any(v.shape == w.shape and torch.equal(v, w) for v in find_tensors(saved) for w in original.values())

    capsys.readouterr()
    assert main.main([*RUN, "--amp", "bf16", "--eval", "--resume", str(once / "checkpoint.pth")]) == 0
    logged = json.loads((once / "log.txt").read_text().splitlines()[-1])
    assert f"* Acc@1 {logged['test_acc1']:.3f} " in capsys.readouterr().out


def find_tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.numel() > 1 and value.any() and not bool((value == 1).all()) else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for part in parts for tensor in find_tensors(part)]


def test_a_student_is_fine_tuned_under_a_teacher(teacher_file, tmp_path, capsys):
    """The average keeps the weights it begins with: those of the file, but for the new heads."""
    torch.save(
        timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, **STUDENT).state_dict(), tmp_path / "s"
    )
    flags = [*RUN, "--distillation-type", "hard", "--teacher-path", str(teacher_file), "--model-ema-decay", "1"]
    assert main.main([*flags, "--finetune", str(tmp_path / "s"), "--output_dir", str(tmp_path / "out")]) == 0
    assert "Teacher test_resnet" in capsys.readouterr().out
    start, saved = torch.load(tmp_path / "s"), torch.load(tmp_path / "out" / "checkpoint.pth")
    for name, tensor in saved["model_ema"].items():
        assert name.startswith("head") or torch.equal(tensor, start[name]), name
    assert not torch.equal(saved["model"]["dist_token"], start["dist_token"])


def test_two_processes_train_one_student(teacher_file, tmp_path):
    flags = [*RUN, "--distillation-type", "hard", "--teacher-path", str(teacher_file), "--accum-steps", "2"]
    status, text, err = torchrun(2, *flags, "--batch-size", "64", "--output_dir", str(tmp_path / "out"))
    assert status == 0, err
    assert text.count("Teacher test_resnet") == 1 and "64 per process x 2 processes" in text
    saved = torch.load(tmp_path / "out" / "checkpoint.pth")
    build_student().load_state_dict(saved["model"], strict=True)


def test_the_student_starts_from_the_weights_it_would_have_without_a_teacher(teacher_file):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    student = ModelConfig("deit_tiny_distilled_patch16_224", input_size=(32, 32))
    teacher = load_teacher(str(teacher_file), student, "test_resnet", is_given=True)
    assert teacher.model.num_classes == 10 and teacher.classes is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_teacher_of_our_own_needs_no_name(tiny_run):
    """Its checkpoint says it, whatever the default of --teacher-model is."""
    student = ModelConfig("deit_tiny_distilled_patch16_224", input_size=(32, 32))
    teacher = load_teacher(str(tiny_run / "checkpoint.pth"), student, "regnety_160", is_given=False)
    assert teacher.config.name == "dhvt_tiny_cifar_patch4" and teacher.classes == [str(d) for d in range(10)]


def test_a_student_without_a_second_head_is_refused(teacher_file, capsys):
    flags = ["--model", "deit_tiny_patch16_224", "--distillation-type", "soft", "--teacher-path", str(teacher_file)]
    assert main.main([*RUN, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--model" in error and "distilled" in error


def test_speed_is_measured_of_the_student_alone(teacher_file, monkeypatch, capsys):
    measure = engine.benchmark
    monkeypatch.setattr(engine, "benchmark", lambda *args, **more: measure(*args, **{**more, "min_seconds": 0.01}))
    flags = ["--distillation-type", "soft", "--teacher-path", str(teacher_file), "--test_speed", "--batch-size", "256"]
    assert main.main([*RUN, *flags]) == 0
    text = capsys.readouterr().out
    assert "train: " in text and "Max accuracy" in text
