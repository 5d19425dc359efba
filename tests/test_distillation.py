"""Distillation: the published loss, a teacher that nothing moves, and runs that keep no trace of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SMALL
from test_resume import differences
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.task.distillation import DistillationTeacher, LogitDistillationTask
from torch import nn

import engine
import main
from losses import DistillationLoss, ImageLoss
from models.build import load_teacher
from util.config import ModelConfig
from util.precision import Precision

GOLDEN = json.loads((Path(__file__).parent / "golden" / "deit_helpers.json").read_text())["distillation"]
LABELS = torch.tensor([1, 2, 3, 9])
STUDENT = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 2}
RUN = (
    f"{SMALL} --model deit_tiny_distilled_patch16_224 --input-size 32 --model-ema-decay 0.9 --lr 1e-3 --unscale-lr "
    "--teacher-model test_resnet --data-set FOLDER --batch-size 4 --epochs 1 --warmup-epochs 0 --model-kwargs"
).split() + [f"{k}={v}" for k, v in STUDENT.items()]


def build_student() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=10, **STUDENT)


def build_teacher() -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model("test_resnet", num_classes=10)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a teacher's checkpoint as several processes save it, with batch statistics of its own."""
    teacher = build_teacher()
    with torch.no_grad():
        teacher.train()(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": {f"module.{k}": v for k, v in teacher.state_dict().items()}, "epoch": 7}, path)
    return path


@pytest.fixture(scope="module")
def flags(tree, teacher_file) -> list[str]:
    """Return flags of short epochs on ten classes."""
    words = ["--accum-steps", "2", "--teacher-path", str(teacher_file), "--data-path"]
    return [*RUN, *words, str(tree("abcdefghij", count=2, side=32))]


class Constant(nn.Module):
    """A teacher whose logits are the same whatever it sees."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits


def golden_inputs() -> list[torch.Tensor]:
    """Return the logits of the class head, of the distillation head and of the teacher, each [4, 10]."""
    random = np.random.RandomState(5)
    return [torch.tensor(random.standard_normal((4, 10))) for _ in range(3)]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['type']}-{c['alpha']}-{c['tau']}")
def test_the_loss_is_the_published_one(case):
    head, distilled, teacher_logits = golden_inputs()
    if case["type"] == "none":
        loss = ImageLoss(F.cross_entropy)(None, head, LABELS)
    else:
        how = [case[name] for name in ("type", "alpha", "tau")]
        loss = DistillationLoss(F.cross_entropy, Constant(teacher_logits), *how)(None, (head, distilled), LABELS)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(case["loss"], rel=2e-6)


@pytest.mark.parametrize(("kind", "tau"), [("hard", 1.0), ("soft", 1.0), ("soft", 3.0)])
def test_gradients_reach_both_heads_and_never_the_teacher(kind, tau):
    head, distilled, teacher_logits = (x.float().requires_grad_() for x in golden_inputs())
    teacher, alpha = Constant(teacher_logits.detach().clone()), 0.3
    DistillationLoss(F.cross_entropy, teacher, kind, alpha, tau)(None, (head, distilled), LABELS).backward()
    assert teacher.logits.grad is None and not teacher.logits.requires_grad
    onehot = torch.eye(10)
    assert torch.allclose(head.grad, (1 - alpha) * (head.softmax(1) - onehot[LABELS]) / 4, atol=1e-7)
    if kind == "hard":
        expected = alpha * (distilled.softmax(1) - onehot[teacher_logits.argmax(1)]) / 4
    else:
        expected = alpha * tau * ((distilled / tau).softmax(1) - (teacher_logits / tau).softmax(1)) / 40
    assert torch.allclose(distilled.grad, expected, atol=1e-7)


def test_the_teacher_sees_the_mixed_images_in_eval_mode_and_in_the_precision_of_the_run():
    student, teacher = build_student(), build_teacher()
    student.set_distilled_training(True)
    precision = Precision(torch.device("cpu"), torch.bfloat16)
    criterion = DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", 0.5, 2.0, precision.autocast)
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


def test_a_run_trains_the_student_alone_and_resumes(flags, teacher_file, tmp_path):
    """With mixed images, an EMA and accumulated batches; no tensor of the teacher is saved."""
    soft = [*flags, "--distillation-type", "soft", "--distillation-tau", "2", "--epochs", "2"]
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert main.main([*soft, "--output_dir", str(once)]) == 0
    assert main.main([*soft, "--output_dir", str(twice), "--resume", str(once / "checkpoint_0000.pth")]) == 0
    saved, resumed = torch.load(once / "checkpoint.pth"), torch.load(twice / "checkpoint.pth")
    assert resumed["epoch"] == 1
    for key in ("model", "model_ema"):
        build_student().load_state_dict(saved[key], strict=True)
        assert differences(saved[key], resumed[key]) == []
    assert sum(len(g["params"]) for g in saved["optimizer"]["param_groups"]) == len(list(build_student().parameters()))
    # nor is a tensor of the teacher elsewhere in it
    assert (once / "checkpoint.pth").stat().st_size < 5 * sum(t.nbytes for t in saved["model"].values())
    assert main.main([*flags, "--eval", "--resume", str(once / "checkpoint.pth")]) == 0


def test_two_processes_train_one_student(runner, flags, tmp_path):
    words = ["--distillation-type", "hard", "--batch-size", "2", "--output_dir", str(tmp_path / "out")]
    result = runner([*flags, *words], tmp_path, 2)
    assert result["status"] == [0, 0], result["err"]
    assert result["out"][0].count("Teacher test_resnet") == 1
    saved = torch.load(tmp_path / "out" / "checkpoint.pth")
    build_student().load_state_dict(saved["model"], strict=True)


def test_the_student_starts_from_the_weights_it_would_have_without_a_teacher(teacher_file):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    student = ModelConfig("deit_tiny_distilled_patch16_224", input_size=(32, 32))
    teacher = load_teacher(str(teacher_file), student, "test_resnet", name="test_resnet")
    assert teacher.model.num_classes == 10 and teacher.classes is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_teacher_of_our_own_needs_no_name(tiny_run):
    """Its checkpoint says what it is, whatever the default of --teacher-model is."""
    student = ModelConfig("deit_tiny_distilled_patch16_224", input_size=(32, 32))
    teacher = load_teacher(str(tiny_run / "checkpoint.pth"), student, "regnety_160")
    assert teacher.config.name == "dhvt_tiny_cifar_patch4" and teacher.classes == [str(d) for d in range(10)]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 1.0), (0.7, 4.0)])
def test_logit_distillation_is_timms(mixed, alpha, tau):
    """Loss and gradients, with mixup and without, against timm's task in float64."""
    student, teacher = build_teacher(), timm.create_model("test_convnext", num_classes=10)
    images, targets = torch.randn(4, 3, 32, 32), LABELS
    base = nn.CrossEntropyLoss()
    if mixed:
        images, targets = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)(images, targets)
        base = SoftTargetCrossEntropy()
    student, teacher, images = student.double().eval(), teacher.double(), images.double()
    targets = targets.double() if mixed else targets
    task = LogitDistillationTask(
        student, teacher, base, task_loss_weight=1 - alpha, temperature=tau, dtype=torch.float64, verbose=False
    )
    expected = task(images, targets)["loss"]
    grads = torch.autograd.grad(expected, list(student.parameters()))
    loss = DistillationLoss(base, teacher, "kd", alpha, tau)(images, student(images), targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for grad, other in zip(torch.autograd.grad(loss, list(student.parameters())), grads, strict=True):
        assert torch.allclose(grad, other, rtol=1e-4, atol=1e-7)


def test_a_teacher_gets_images_normalized_as_it_was_trained(tiny_run):
    """timm's teacher as the reference: it normalizes the student's images anew."""
    student = ModelConfig("resnet18_cifar", input_size=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    file = str(tiny_run / "checkpoint.pth")
    images = torch.randn(4, 3, 32, 32)
    plain = DistillationTeacher(load_teacher(file, ModelConfig(student.name, input_size=(32, 32)), "").model)
    stats = [torch.tensor(values).view(1, 3, 1, 1) for values in (student.mean, student.std)]
    expected = plain(plain.normalize_input(images, *stats))
    assert torch.allclose(load_teacher(file, student, "").model(images), expected, atol=1e-6)
    assert not torch.allclose(plain(images), expected, atol=1e-3)


def test_a_cnn_learns_from_a_dhvt_and_resumes(tiny_run, tiny_flags, tmp_path):
    small = "--model-kwargs layers=(1,1,1,1) channels=(8,8,8,8) --epochs 2 --unscale-lr --train-fraction 0.2".split()
    plain = [*tiny_flags, "--model", "resnet18_cifar", "--model-kwargs", *small]  # not the tiny ones
    words = [*plain, "--kd", "--teacher-path", str(tiny_run / "checkpoint.pth"), "--distillation-tau", "2"]
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert main.main([*words, "--output_dir", str(once)]) == 0
    assert main.main([*words, "--output_dir", str(twice), "--resume", str(once / "checkpoint_0000.pth")]) == 0
    saved, resumed = torch.load(once / "checkpoint.pth"), torch.load(twice / "checkpoint.pth")
    assert resumed["epoch"] == 1 and differences(saved["model"], resumed["model"]) == []
    # alpha 0 leaves the labels alone
    assert main.main([*plain, "--output_dir", str(tmp_path / "plain")]) == 0
    assert main.main([*words, "--distillation-alpha", "0", "--output_dir", str(tmp_path / "zero")]) == 0
    alone, zero = (torch.load(tmp_path / name / "checkpoint.pth")["model"] for name in ("plain", "zero"))
    assert differences(alone, zero) == [] and differences(alone, saved["model"]) != []
