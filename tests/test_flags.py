"""What each flag does, where it acts: data, epochs and pictures are stand-ins that record what they are called with."""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import timm
import torch
import wandb
from conftest import SMALL
from PIL import Image
from timm.models import _builder
from torch import nn

import datasets
import engine
import main
from data.images import ImageArray
from util import checkpoint, command, data_options, distributed, options, report, visualize
from util.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
BASE = f"{SMALL} --data-set DIGITS --epochs 1 --warmup-epochs 0"
EVIT = (
    "--model deit_tiny_patch16_shrink_base --model-kwargs patch_size=8 embed_dim=32 depth=2 num_heads=2 "
    "--input-size 32 --drop_loc 1"
)
TEACHER = "--teacher-model test_resnet --teacher-path teacher.pth"
STUDENT = (
    "--model deit_tiny_distilled_patch16_224 --model-kwargs patch_size=8 embed_dim=32 depth=1 num_heads=2 "
    f"--input-size 32 --distillation-type hard {TEACHER}"
)
EVAL = "--eval --resume run/checkpoint.pth"
DEEPER = "--model-kwargs depth=2"
STEP = "--sched step --unscale-lr"
COMPILE = "--compile --no-model-ema"
NET = "test_resnet"
PICTURES = "--visualize_attention --resume run/checkpoint.pth"


def blank_images(count: int = 64) -> ImageArray:
    classes = [str(i) for i in range(10)]
    return ImageArray(np.zeros((count, 8, 8, 3), np.uint8), [i % 10 for i in range(count)], classes, None)


class Recorder:
    """Stand-ins for the parts of a run, which record what they are called with."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.orders: list[list[tuple]] = []
        self.rates: list[float] = []
        self.mixed: list[bool] = []
        self.evaluated: list[nn.Module] = []
        self.benchmarked: list[int] = []
        self.compiled: list[nn.Module] = []
        self.compile_modes: list[str] = []
        self.kept: list[int] = []
        self.pictures: tuple[str, list[str]] = ("", [])
        self.picture_options: dict = {}
        self.reported: Path | None = None

    def build_train_set(self, data, config, augment) -> ImageArray:
        self.data = data
        self.augment = augment
        return blank_images()

    def build_val_set(self, data, config, classes=None) -> ImageArray:
        self.val_data = data
        self.val_config = config
        return blank_images()

    def train_one_epoch(self, model, criterion, loader, precision, state, **kwargs) -> dict[str, float]:
        self.criterion = criterion
        self.loader = loader
        self.precision = precision
        self.state = state
        self.kwargs = SimpleNamespace(**kwargs)
        self.training = model.training
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.matmul = torch.get_float32_matmul_precision()
        self.epochs.append(state.epoch + 1)
        self.orders.append(list(loader.sampler))
        self.mixed.append(self.kwargs.mixup is not None and self.kwargs.mixup.mixup_enabled)
        self.rates.append(round(max(group["lr"] for group in state.optimizer.param_groups), 10))
        return {"train_loss": 1.0, "train_lr": 1.0}

    def evaluate(self, model, loader, precision, **kwargs) -> dict[str, float]:
        self.evaluated.append(model)
        return {"loss": 1.0, "acc1": 50.0, "acc5": 50.0, "topk": 5, "count": 60}

    def write_report(self, folder, *_) -> None:
        self.reported = folder

    def benchmark(self, model, size, batch_size, precision, **kwargs) -> dict[str, float]:
        self.benchmarked.append(batch_size)
        self.compile_modes.append(kwargs["compile_mode"])
        return defaultdict(float)

    def compile(self, module, mode="default") -> None:
        self.compiled.append(module)
        self.compile_modes.append(mode)

    def write_pictures(self, mode, model, samples, **kwargs) -> list[Path]:
        self.pictures = mode, [source for *_, source in samples]
        self.picture_options = kwargs
        return [Path("last.png")]

    def init(self, device, backend, timeout) -> torch.device:
        self.timeout = timeout
        return torch.device(device)

    def save_checkpoint(self, content, folder, keep, best) -> None:
        self.kept.append(keep)


@pytest.fixture(scope="module")
def place(tiny_run, tmp_path_factory) -> Path:
    """Return a folder with run/, which is `tiny_run`, teachers and images/.

    old.pth is a checkpoint without its epoch, held_out.pth one with a hold-out, packed.pth one of a database.
    """
    folder = tmp_path_factory.mktemp("flags")
    (folder / "run").symlink_to(tiny_run)
    saved = torch.load(tiny_run / "checkpoint.pth")
    torch.save({name: value for name, value in saved.items() if name != "epoch"}, folder / "old.pth")
    for file, field, value in (("held_out.pth", "val_fraction", 0.1), ("packed.pth", "lmdb", True)):
        torch.save({**saved, "data": {**saved["data"], field: value}}, folder / file)
    teacher = timm.create_model("test_resnet", num_classes=10)
    torch.save(teacher.state_dict(), folder / "teacher.pth")
    nn.init.constant_(teacher.fc.bias, 2.0)
    torch.save(teacher.state_dict(), folder / "teacher2.pth")
    torch.save(timm.create_model("test_byobnet", num_classes=10).state_dict(), folder / "byob.pth")
    (folder / "images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images" / "a.png")
    (folder / "flags.yaml").write_text("seed: 3")
    (folder / "own.py").write_text("from timm.models import register_model\n\n\n@register_model\ndef of_a_file(): ...")
    return folder


@pytest.fixture
def observe(place, tmp_path, monkeypatch) -> Callable[[str], Recorder]:
    """Return a function that runs main.py in a folder like `place` and returns what the stand-ins recorded."""
    monkeypatch.chdir(tmp_path)
    for path in place.iterdir():
        Path(path.name).symlink_to(path)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def run(flags: str) -> Recorder:
        seen = Recorder()
        for module, names in STAND_INS.items():
            for name in names:
                monkeypatch.setattr(module, name, getattr(seen, name))
        monkeypatch.setattr(wandb, "init", lambda **kwargs: MagicMock(id="x1"))
        monkeypatch.setattr(nn.Module, "compile", lambda module, mode="default": seen.compile(module, mode))
        # instead of the hub
        monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *_, **__: timm.create_model(NET).state_dict())
        try:
            assert main.main(f"{BASE} {flags}".split()) == 0
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = True
            torch.set_float32_matmul_precision("highest")
        return seen

    return run


STAND_INS = {
    datasets: ("build_train_set", "build_val_set"),
    engine: ("train_one_epoch", "evaluate", "benchmark"),
    visualize: ("write_pictures",),
    report: ("write_report",),
    distributed: ("init",),
    checkpoint: ("save_checkpoint",),
}


def group(seen: Recorder) -> dict:
    """Return the options of the first group of parameters."""
    return seen.state.optimizer.param_groups[0]


def keep_rates(seen: Recorder) -> list[float]:
    """Return the keep rate at the start of each of 14 epochs."""
    return [round(seen.kwargs.keep_rate_schedule(epoch * seen.state.updates_per_epoch), 3) for epoch in range(14)]


def noise(seen: Recorder) -> float:
    """Return the largest relative difference of a learning rate from the default."""
    return max(abs(rate / 5e-4 - 1) for rate in seen.rates)


def teacher(seen: Recorder) -> str:
    return type(seen.criterion.teacher).__name__


def class_weights(seen: Recorder) -> list[float] | None:
    weights = seen.criterion.loss.weight
    return weights if weights is None else [round(weight, 3) for weight in weights.tolist()]


def draws_batch(seen: Recorder) -> bool:
    seen.criterion(torch.zeros(2, 3, 32, 32), torch.zeros(2, 10), torch.full((2, 10), 0.1))
    return Path("out/train_images.png").exists()


def dropout(module: nn.Module) -> float:
    return max(part.p for part in module.modules() if isinstance(part, nn.Dropout))


def equals(name: str, tensor: torch.Tensor, key: str = "model") -> bool:
    """Return whether a tensor is that of the tiny run's checkpoint."""
    return torch.equal(tensor, torch.load("run/checkpoint.pth")[key][name])


def other_weights(seen: Recorder) -> bool:
    """Return whether no weight matrix begins as in a run without flags."""
    matrices = [[p for p in s.state.model.parameters() if p.ndim > 1 and p.std() > 0] for s in (seen, WITHOUT[""])]
    return not any(map(torch.equal, *matrices))


# flag: its value, the flags besides it, what it changes (an attribute, or a function) and to what
ROWS: dict[str, tuple[str, str, str | Callable, object]] = {
    "--config": ("flags.yaml", "", "loader.sampler.seed", 3),
    "-c": ("flags.yaml", "", "loader.sampler.seed", 3),
    "--batch-size": ("32", "", "loader.batch_size", 32),
    "--epochs": ("3", "", "epochs", [0, 1, 2]),
    "--accum-steps": ("4", "", lambda s: (s.kwargs.accum_steps, s.rates), (4, [2.5e-4])),
    "--output_dir": ("out", "", "state.folder", Path("out")),
    "--resume": ("run/checkpoint.pth", "--epochs 2", "epochs", [1]),
    "--start_epoch": ("1", "--epochs 3 --resume old.pth", "epochs", [1, 2]),
    "--checkpoint-interval": ("0.5", "--output_dir out --resume auto", "kwargs.stop.interval", 0.5),
    "--log-wandb": ("p", "--output_dir out", "state.wandb_id", "x1"),
    "--save-images": ("", "--output_dir out", draws_batch, True),
    "--keep-checkpoints": ("5", "--output_dir out --resume auto", lambda s: s.kept[-1], 5),
    "--eval": ("", "--resume run/checkpoint.pth --epochs 2", "epochs", []),
    "--report": ("report", EVAL, "reported", Path("report")),
    "--use-ema": ("", EVAL, lambda s: equals("head.bias", s.evaluated[0].head.bias, "model_ema"), True),
    "--eval-freq": ("2", "--epochs 3 --no-model-ema", lambda s: len(s.evaluated), 2),
    "--print-freq": ("3", "", "kwargs.print_freq", 3),
    "--test_speed": ("", "", lambda s: (s.benchmarked, s.epochs), ([64, 64], [0])),
    "--only_test_speed": ("", "", lambda s: (s.benchmarked, s.epochs), ([64, 64], [])),
    "--speed-batch-size": ("3", "--only_test_speed", "benchmarked", [3, 3]),
    "--seed": ("3", "", lambda s: (s.kwargs.seed, s.loader.sampler.seed, other_weights(s)), (3, 3, True)),
    "--deterministic": ("", "", "deterministic", True),
    "--amp": ("bf16", "", "precision.dtype", torch.bfloat16),
    "--tf32": ("", "", "matmul", "high"),
    "--compile": ("", "", lambda s: s.compiled == [s.state.model, s.state.ema and s.state.ema.module], True),
    "--torchcompile-mode": ("max-autotune", COMPILE, "compile_modes", ["max-autotune"]),
    "--channels-last": ("", "", lambda s: s.kwargs.prepare(torch.zeros(2, 3, 8, 8)).stride(1), 1),
    "--grad-checkpointing": ("", "", lambda s: s.state.model.grad_checkpointing, True),
    # the model
    "--import": ("own.py", "", lambda s: (s.state.args["import"], timm.is_model("of_a_file")), ("own.py", True)),
    "--model": ("dhvt_tiny_cifar_patch2", "", "state.config.name", "dhvt_tiny_cifar_patch2"),
    "--model-kwargs": ("depth=2", "", lambda s: len(s.state.model.blocks), 2),
    "--input-size": ("48 32", "", "state.model.patch_embed.grid_size", (12, 8)),
    "--nb-classes": ("12", "", "state.model.num_classes", 12),
    "--eval-crop-ratio": ("1", "--input-size 48", "val_config.crop_ratio", 1.0),
    "--mean": ("0.5 0.4 0.3", "", "val_config.mean", [0.5, 0.4, 0.3]),
    "--std": ("0.2 0.2 0.1", "", "val_config.std", [0.2, 0.2, 0.1]),
    "--drop": ("0.2", "", lambda s: (dropout(s.state.model.blocks), s.state.model.head_drop.p), (0.2, 0.0)),
    "--drop-path": ("0.25", DEEPER, lambda s: s.state.model.blocks[1].drop_path1.drop_prob, 0.25),
    "--model-ema": ("", "--no-model-ema", lambda s: s.state.ema is not None, True),
    "--no-model-ema": ("", "", "state.ema", None),
    "--model-ema-decay": ("0.5", "", "state.ema.decay", 0.5),
    "--model-ema-warmup": ("", "", "state.ema.use_warmup", True),
    "--model-ema-force-cpu": ("", "", "state.ema.device", "cpu"),
    "--base_keep_rate": ("0.5", f"{EVIT} --shrink_start_epoch 0", keep_rates, [0.5] * 14),
    "--fuse_token": ("", EVIT, "state.model.fuse_token", True),
    "--no-fuse_token": ("", f"{EVIT} --fuse_token", "state.model.fuse_token", False),
    "--drop_loc": ("0", EVIT, "state.model.drop_loc", (0,)),
    "--shrink_start_epoch": ("2", EVIT, keep_rates, [1.0] * 2 + [0.7] * 12),
    "--shrink_epochs": ("2", EVIT, keep_rates, [1.0] * 11 + [0.85] + [0.7] * 2),
    # fine-tuning
    "--pretrained": ("", f"--model {NET} --model-kwargs", lambda s: s.val_config.interpolation, "bilinear"),
    "--finetune": ("run/checkpoint.pth", "", lambda s: equals("norm.weight", s.state.model.norm.weight), True),
    "--freeze": ("head", "", lambda s: s.state.model.norm.weight.requires_grad, False),
    "--layer-decay": ("0.5", "", lambda s: group(s).get("lr_scale"), 0.25),
    "--train-mode": ("", "--no-train-mode", "training", True),
    "--no-train-mode": ("", "", "training", False),
    # optimization; the rates are those of each epoch
    "--opt": ("sgd", "", lambda s: type(s.state.optimizer).__name__, "SGD"),
    "--opt-eps": ("1e-6", "", lambda s: group(s)["eps"], 1e-6),
    "--opt-betas": ("0.8 0.95", "", lambda s: tuple(group(s)["betas"]), (0.8, 0.95)),
    "--opt-kwargs": ("amsgrad=true", "", lambda s: group(s)["amsgrad"], True),
    "--momentum": ("0.5", "--opt sgd", lambda s: group(s)["momentum"], 0.5),
    "--weight-decay": ("0.1", "", lambda s: s.state.optimizer.param_groups[-1]["weight_decay"], 0.1),
    "--clip-grad": ("1", "", "kwargs.clip_grad", 1.0),
    "--lr": ("1e-3", "", "rates", [1.25e-4]),
    "--unscale-lr": ("", "", "rates", [5e-4]),
    "--sched": ("step", "--epochs 4 --decay-epochs 2 --unscale-lr", "rates", [5e-4, 5e-4, 5e-5, 5e-5]),
    "--decay-epochs": ("1", f"{STEP} --epochs 2", "rates", [5e-4, 5e-5]),
    "--decay-rate": ("0.5", f"{STEP} --epochs 2 --decay-epochs 1", "rates", [5e-4, 2.5e-4]),
    "--dr": ("0.5", f"{STEP} --epochs 2 --decay-epochs 1", "rates", [5e-4, 2.5e-4]),
    "--warmup-lr": ("1e-5", "--epochs 3 --warmup-epochs 2", lambda s: s.rates[0], 1e-5),
    "--warmup-epochs": ("2", "--epochs 3 --unscale-lr", lambda s: s.rates[:2], [1e-6, 2.505e-4]),
    "--min-lr": ("1e-4", "--epochs 2 --unscale-lr", lambda s: s.rates[1], 3e-4),
    "--lr-noise": ("0.4 0.8", f"{STEP} --epochs 5", lambda s: [r != 5e-4 for r in s.rates], [0, 0, 1, 1, 0]),
    "--lr-noise-pct": ("0.01", f"{STEP} --epochs 5 --lr-noise 0", lambda s: noise(s) < 0.01, True),
    "--lr-noise-std": ("1e-3", f"{STEP} --epochs 5 --lr-noise 0", lambda s: noise(s) < 0.01, True),
    "--bce-loss": ("", "--smoothing 0", lambda s: type(s.criterion.loss).__name__, "BinaryCrossEntropy"),
    "--smoothing": ("0.3", "", "kwargs.mixup.label_smoothing", 0.3),
    "--mixup": ("0.2", "", "kwargs.mixup.mixup_alpha", 0.2),
    "--cutmix": ("0.2", "", "kwargs.mixup.cutmix_alpha", 0.2),
    "--cutmix-minmax": ("0.2 0.4", "", "kwargs.mixup.cutmix_minmax", [0.2, 0.4]),
    "--mixup-prob": ("0.3", "", "kwargs.mixup.mix_prob", 0.3),
    "--mixup-switch-prob": ("1", "", "kwargs.mixup.switch_prob", 1.0),
    "--mixup-mode": ("elem", "", "kwargs.mixup.mode", "elem"),
    "--mixup-off-epoch": ("2", "--epochs 4", "mixed", [True, True, False, False]),
    "--class-weights": ("balanced", "", class_weights, [0.914] * 4 + [1.067] * 6),
    # augmentation and data
    "--aa": ("rand-m5", "", "augment.aa", "rand-m5"),
    "--color-jitter": ("0.1", "", "augment.color_jitter", 0.1),
    "--crop": ("squash", "", lambda s: (s.augment.crop, s.val_config.crop_mode), ("squash", "squash")),
    "--scale": ("0.5 0.9", "", "augment.scale", [0.5, 0.9]),
    "--ratio": ("0.9 1.1", "", "augment.ratio", [0.9, 1.1]),
    "--hflip": ("0.2", "", "augment.hflip", 0.2),
    "--vflip": ("0.5", "", "augment.vflip", 0.5),
    "--train-interpolation": ("bilinear", "", "augment.interpolation", "bilinear"),
    "--reprob": ("0.5", "", "kwargs.prepare.random_erasing.probability", 0.5),
    "--remode": ("const", "", "augment.remode", "const"),
    "--recount": ("2", "", "kwargs.prepare.random_erasing.max_count", 2),
    "--ThreeAugment": ("", "", "augment.three_augment", True),
    "--src": ("", "--ThreeAugment", "augment.src", True),
    "--repeated-aug": ("", "--no-repeated-aug", "loader.sampler.repeated_aug", True),
    "--no-repeated-aug": ("", "", "loader.sampler.repeated_aug", False),
    "--data-set": ("CIFAR-10", "--data-path x", "data.name", "CIFAR-10"),
    "--data-path": ("x", "", "data.root", "x"),
    "--train-split": ("training", "--data-set FOLDER --data-path x", "data.train_split", "training"),
    "--val-split": ("test", "--data-set FOLDER --data-path x", "data.val_split", "test"),
    "--train-fraction": ("0.5", "", "data.train_fraction", 0.5),
    "--val-fraction": ("0.2", "", lambda s: (s.data.val_fraction, s.val_data.holds_out), (0.2, True)),
    "--folds": ("5", "", lambda s: (s.data.folds, s.val_data.holds_out), (5, True)),
    "--fold": ("2", "--folds 3", "val_data.fold", 2),
    "--split-seed": ("7", "--folds 3", "val_data.split_seed", 7),
    "--split": ("test", "--eval --resume held_out.pth", "val_data.holds_out", False),
    "--use-lmdb": ("", "--data-set FOLDER --data-path x", "data.lmdb", True),
    "--no-use-lmdb": ("", "--eval --resume packed.pth", "val_data.lmdb", False),
    "--inat-category": ("order", "--data-set INAT --data-path x", "data.inat_category", "order"),
    "--transform": ("timm", "", "data.transform", "timm"),
    "--num_workers": ("3", "", "loader.num_workers", 3),
    # distillation
    "--distillation-type": ("soft", STUDENT, "criterion.kind", "soft"),
    "--kd": (TEACHER, "", lambda s: getattr(s.criterion, "kind", ""), "kd"),
    "--distillation-alpha": ("0.9", STUDENT, "criterion.alpha", 0.9),
    "--distillation-tau": ("3", STUDENT, "criterion.tau", 3.0),
    "--teacher-model": ("test_byobnet --teacher-path byob.pth", STUDENT, teacher, "ByobNet"),
    "--teacher-path": ("teacher2.pth", STUDENT, lambda s: s.criterion.teacher.fc.bias[0].item(), 2.0),
    # pictures and processes
    "--visualize": ("matrix", "--resume run/checkpoint.pth", lambda s: s.pictures[0], "matrix"),
    "--visualize_mask": ("", "--resume run/checkpoint.pth", lambda s: s.pictures[0], "mask"),
    "--visualize_attention": ("", "--resume run/checkpoint.pth", lambda s: s.pictures[0], "attention"),
    "--n_visualization": ("2", PICTURES, lambda s: s.pictures[1], ["image 0", "image 32"]),
    "--image-dir": ("images", PICTURES, lambda s: s.pictures[1], ["a.png"]),
    "--blocks": ("2 5", PICTURES, lambda s: s.picture_options["blocks"], [2, 5]),
    "--format": ("pdf", PICTURES, lambda s: s.picture_options["file_format"], "pdf"),
    "--npz": ("", PICTURES, lambda s: s.picture_options["npz"], True),
    "--dist-timeout": ("7", "", "timeout", 7.0),
}


# what was recorded without a row's flag, by the flags besides it
WITHOUT: dict[str, Recorder] = {}


@pytest.mark.parametrize("flag", ROWS)
def test_a_flag_does_what_it_is_for(flag, observe):
    value, context, probe, expected = ROWS[flag]
    probe = attrgetter(probe) if isinstance(probe, str) else probe
    if context not in WITHOUT:
        WITHOUT[context] = observe(context)
    assert probe(WITHOUT[context]) != expected
    assert probe(observe(f"{context} {flag} {value}")) == expected


def test_every_epoch_has_an_order_and_augmentations_of_its_own(observe):
    orders = observe("--epochs 3").orders
    # what a sample's augmentation is seeded with
    assert [{epoch for _, epoch, _ in order} for order in orders] == [{0}, {1}, {2}]
    assert len({tuple(index for index, *_ in order) for order in orders}) == 3


@pytest.mark.parametrize("flags", [f"{COMPILE} --only_test_speed", f"{COMPILE} {EVAL}"])
def test_speed_and_evaluation_compile_in_the_mode_too(flags, observe):
    modes = observe(f"{flags} --torchcompile-mode reduce-overhead").compile_modes
    assert modes and set(modes) == {"reduce-overhead"}


def test_names_of_data_sets_may_be_written_in_any_case():
    for name in ("CIFAR-10", "FOLDER", "clipart"):
        for word in (name.lower(), name.upper()):
            assert options.parse([*BASE.split(), "--data-set", word]).data_set == name


@pytest.mark.parametrize(("flags", "pinned"), [("", True), ("--no-pin-mem", False), ("--no-pin-mem --pin-mem", True)])
def test_pinned_memory_is_for_accelerators(flags, pinned):
    args = options.parse([*BASE.split(), *flags.split()])
    assert data_options.data_config(args, torch.device("cuda")).pin_memory is pinned
    assert data_options.data_config(args, CPU).pin_memory is False


SPECIAL = {"--device", "--pin-mem", "--no-pin-mem", "--dist-backend"}
NO_EFFECT = {
    "--resplit": "",
    "--dist-eval": "",
    "--world_size": "2",
    "--dist_url": "tcp://1.2.3.4:5",
    "--local_rank": "1",
    "--cooldown-epochs": "3",
    "--patience-epochs": "3",
}


def all_flags() -> dict[str, argparse.Action]:
    return {s: a for a in options.build_parser()._actions for s in a.option_strings if s not in ("-h", "--help")}


def test_every_flag_has_its_row():
    rows = [*ROWS, *SPECIAL, *NO_EFFECT]
    assert len(rows) == len(set(rows)) and set(rows) == set(all_flags())


def test_flags_of_old_command_lines_are_accepted_and_their_help_says_that_they_have_no_effect():
    before = vars(options.parse(BASE.split()))
    for flag, value in NO_EFFECT.items():
        action = all_flags()[flag]
        after = vars(options.parse([*BASE.split(), flag, *value.split()]))
        assert {name for name in after if after[name] != before[name]} == {action.dest, "given"}
        assert "no effect" in action.help


NOT_HERE = {"cosub", "attn_only", "distributed"}  # the specification leaves them out
OTHER_DEFAULTS = dict.fromkeys(("device", "data_path", "input_size", "num_workers"))
WORDS = {"int": "2", "float": "0.5"}


def test_published_flags_keep_spelling_type_default_and_choices():
    flags = all_flags()
    for row in json.loads((GOLDEN / "cli_flags.json").read_text()):
        if row["dest"] in NOT_HERE:
            assert row["flags"][0] not in flags
            continue
        for flag in row["flags"]:
            action = flags[flag]
            assert action.dest == row["dest"], flag
            assert action.default == OTHER_DEFAULTS.get(row["dest"], row["default"]), flag
            assert (action.nargs == 0) == (row["nargs"] == "switch"), flag
            if row["type"] in WORDS:
                assert type(action.type(WORDS[row["type"]])).__name__ == row["type"], flag
            if row["choices"]:
                assert set(row["choices"]) <= set(action.choices), flag


def test_dashes_and_underscores_are_alike_and_what_was_given_is_known():
    one = options.parse("--batch-size 32 --output_dir=a_b-c --no-repeated-aug --ThreeAugment".split())
    two = options.parse("--batch_size=32 --output-dir a_b-c --no_repeated_aug --ThreeAugment".split())
    assert vars(one) == vars(two) and one.given == {"batch_size", "output_dir", "repeated_aug", "ThreeAugment"}


HINTS = {"--wd": "--weight-decay", "-batch-size": "--batch-size", "--epoch": "--epochs", "--no-such-flag": "--help"}


@pytest.mark.parametrize("flag", HINTS)
def test_unknown_flags_and_prefixes_are_refused_with_a_hint(flag):
    with pytest.raises(InputError, match=f"^{flag}: .*{HINTS[flag]}\\b"):
        options.parse([*BASE.split(), flag, "1"])


@pytest.mark.parametrize(
    ("kind", "taken", "refused"),
    [
        (command.positive_int, "1 7", "0 -1 1.5 x 2147483648"),
        (command.nonnegative_int, "0 7", "-1 nan"),
        (command.positive_float, "1e-9 3", "0 -1 inf nan x"),
        (command.nonnegative_float, "0 0.5", "-0.1 inf"),
        (command.fraction, "0 1", "-0.1 1.1"),
        (command.open_fraction, "0.1 1", "0 1.1 nan"),
        (command.below_one, "0 0.99", "1 -0.1"),
    ],
)
def test_types_of_flags_check_their_range(kind, taken, refused):
    assert [kind(word) for word in taken.split()] == [float(word) for word in taken.split()]
    for word in refused.split():
        with pytest.raises(argparse.ArgumentTypeError, match=word):
            kind(word)


@pytest.mark.parametrize("flag", ["--base_keep_rate 0.5", "--fuse_token", "--drop_loc 3,6", "--shrink_start_epoch 1"])
def test_flags_of_token_reorganisation_are_refused_for_models_without_it(flag):
    with pytest.raises(InputError, match=flag.split()[0]):
        options.parse(f"{BASE} {flag}".split())
    options.parse(f"{BASE} {EVIT} {flag}".split())
