"""One row a flag: a context in which setting it changes something, or that start-up says it has no effect."""

import argparse
import contextlib
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import builders
import datasets
import engine
import main
import training as train_module
from util import options, report
from util.distributed import init
from util.errors import InputError

CPU = torch.device("cpu")
BASE = ["--data-set", "DIGITS", "--model", "dhvt_tiny_cifar_patch4", "--model-kwargs", "depth=2", "embed_dim=32"]
BASE += ["num_heads=2", "--device", "cpu"]


def rates(args: argparse.Namespace) -> list:
    """Give each epoch's rate of each parameter group."""
    optimizer, scheduler, _ = builders.build_optimization(args, builders.build_model(args, 10, (32, 32)), CPU)
    found = []
    for epoch in range(args.epochs):
        scheduler.step(epoch)
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


def optimizer(args: argparse.Namespace) -> list:
    found, _, _ = builders.build_optimization(args, nn.Linear(3, 3), CPU)
    return [type(found).__name__, [{k: v for k, v in g.items() if k != "params"} for g in found.param_groups]]


def model(args: argparse.Namespace) -> list:
    """Give the model's structure; timm's classifier for classes is there when --nb-classes is."""
    size = builders.find_input_size(args)
    return [str(builders.build_model(args, args.nb_classes, size)), size]


def training(args: argparse.Namespace) -> str:
    return str(datasets.build_train_dataset(args, (48, 48)).transform)


def evaluation(args: argparse.Namespace) -> str:
    return str(datasets.build_val_dataset(args, (48, 48), None).transform)


def loader(args: argparse.Namespace) -> list:
    found = datasets.build_train_loader(args, datasets.build_train_dataset(args, (32, 32)))
    found.sampler.set_epoch(1)
    return [list(found.sampler)[:50], found.batch_size, found.num_workers, found.pin_memory]


def mixing(args: argparse.Namespace) -> list:
    """Give what the criterion and the mixing of images make of one batch."""
    images, targets = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
    criterion, mixup = builders.build_criterion(args, 4)
    found = []
    for seed in range(6):
        np.random.seed(seed)
        mixed, labels = (images, targets) if mixup is None else mixup(images.clone(), targets)
        found += [mixed.tolist(), criterion(images.mean(dim=3)[:, :, :4].mean(dim=1), labels).item()]
    return found


# flag: what to give it, in which context besides, and what changes
PROBED: dict[str, tuple[str, str, Callable]] = {
    "--batch-size": ("32", "", loader),
    "--epochs": ("7", "", rates),
    "--accum-steps": ("4", "--epochs 2", rates),
    "--lr": ("1e-3", "--epochs 6", rates),
    "--unscale-lr": ("", "--epochs 6", rates),
    "--sched": ("step", "--epochs 40", rates),
    "--lr-noise": ("0.2 0.8", "--epochs 10", rates),
    "--lr-noise-pct": ("0.01", "--epochs 10 --lr-noise 0.2 0.8", rates),
    "--lr-noise-std": ("0.2", "--epochs 10 --lr-noise 0.2 0.8", rates),
    "--warmup-lr": ("1e-5", "--epochs 6", rates),
    "--min-lr": ("1e-4", "--epochs 9", rates),
    "--decay-epochs": ("2", "--epochs 9 --sched step", rates),
    "--warmup-epochs": ("1", "--epochs 9", rates),
    "--decay-rate": ("0.5", "--epochs 40 --sched step", rates),
    "--layer-decay": ("0.5", "--epochs 2", rates),
    "--opt": ("sgd", "", optimizer),
    "--opt-eps": ("1e-6", "", optimizer),
    "--opt-betas": ("0.8 0.95", "", optimizer),
    "--momentum": ("0.5", "--opt sgd", optimizer),
    "--weight-decay": ("0.1", "", optimizer),
    "--model": ("dhvt_tiny_cifar_patch2", "", model),
    "--model-kwargs": ("depth=1", "", model),
    "--input-size": ("48 32", "", model),
    "--nb-classes": ("7", "", model),
    "--drop": ("0.2", "", model),
    "--drop-path": ("0.3", "", model),
    "--aa": ("rand-m5", "", training),
    "--color-jitter": ("0.1", "--aa none", training),
    "--train-interpolation": ("bilinear", "", training),
    "--reprob": ("0.5", "", training),
    "--remode": ("const", "", training),
    "--recount": ("2", "", training),
    "--ThreeAugment": ("", "", training),
    "--src": ("", "--ThreeAugment", training),
    "--eval-crop-ratio": ("1", "", evaluation),
    "--transform": ("timm", "", training),
    "--seed": ("3", "", loader),
    "--repeated-aug": ("", "--no-repeated-aug", loader),
    "--no-repeated-aug": ("", "", loader),
    "--num_workers": ("3", "", loader),
    "--mixup": ("0.2", "--cutmix 0", mixing),
    "--cutmix": ("0.2", "--mixup 0", mixing),
    "--cutmix-minmax": ("0.2 0.4", "", mixing),
    "--mixup-prob": ("0.3", "", mixing),
    "--mixup-switch-prob": ("1", "", mixing),
    "--mixup-mode": ("elem", "", mixing),
    "--smoothing": ("0.3", "", mixing),
    "--bce-loss": ("", "--smoothing 0", mixing),
}


@pytest.mark.parametrize("flag", PROBED)
def test_setting_a_flag_changes_what_it_is_for(flag):
    value, context, probe = PROBED[flag]
    given = [*BASE, *context.split()]
    with_flag = options.parse([*given, flag, *value.split()])
    assert probe(options.parse(given)) != probe(with_flag)
    assert options.without_effect(with_flag) == []


# flag: what to give it, and in which context besides; a whole run prints, writes or computes something else
RUNS = {
    "--model-ema": ("", "--no-model-ema"),
    "--no-model-ema": ("", ""),
    "--model-ema-decay": ("0.5", ""),
    "--clip-grad": ("1e-4", "--opt sgd"),
    "--eval-freq": ("2", "--epochs 2"),
    "--print-freq": ("1", ""),
    "--output_dir": ("out2", ""),
    "--keep-checkpoints": ("1", ""),
    "--resume": ("run/checkpoint.pth", "--epochs 2"),
    "--start_epoch": ("1", "--epochs 3 --resume old.pth"),
    "--eval": ("", "--resume run/checkpoint.pth --epochs 2"),
    "--use-ema": ("", "--eval --resume run/checkpoint.pth"),
    "--test_speed": ("", ""),
    "--only_test_speed": ("", ""),
    "--amp": ("bf16", ""),
    "--data-set": ("DIGITS", ""),
    "--data-path": ("other", ""),
    "--use-lmdb": ("", "--batch-size 4"),
    "--finetune": ("run/checkpoint.pth", ""),
    "--freeze": ("head", ""),
    "--train-mode": ("", "--no-train-mode"),
    "--no-train-mode": ("", ""),
    "--distillation-type": ("soft", "STUDENT"),
    "--distillation-alpha": ("0.9", "STUDENT --distillation-type hard"),
    "--distillation-tau": ("3", "STUDENT --distillation-type soft"),
    "--teacher-model": ("test_byobnet --teacher-path byob.pth", "STUDENT --distillation-type hard"),
    "--teacher-path": ("teacher2.pth", "STUDENT --distillation-type hard"),
    "--base_keep_rate": ("0.5", "EVIT"),
    "--fuse_token": ("", "EVIT"),
    "--drop_loc": ("0", "EVIT"),
    "--shrink_start_epoch": ("1", "EVIT"),
    "--shrink_epochs": ("2", "EVIT --epochs 2"),
    "--visualize_mask": ("", "EVIT --resume evit/checkpoint.pth"),
    "--visualize_attention": ("", "--resume run/checkpoint.pth"),
    "--n_visualization": ("2", "--resume run/checkpoint.pth --visualize_attention"),
    "--image-dir": ("other/train/ant", "--resume run/checkpoint.pth --visualize_attention"),
}

STUDENT = "--model deit_tiny_distilled_patch16_224 --model-kwargs patch_size=8 embed_dim=32 depth=1 num_heads=2"
STUDENT += " --teacher-model test_resnet --teacher-path teacher.pth"
TINY = "--model dhvt_tiny_cifar_patch4 --model-kwargs depth=1 embed_dim=32 num_heads=2 --input-size 32 --device cpu"
TINY += " --num_workers 0 --data-set FOLDER --data-path data --batch-size 8 --epochs 1 --warmup-epochs 0 --lr 1e-2"
EVIT = "--model deit_tiny_patch16_shrink_base --model-kwargs patch_size=8 embed_dim=32 depth=2 num_heads=2"
EVIT += " --drop_loc 1 --shrink_start_epoch 0"
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def place(tree, tmp_path_factory) -> Path:
    """Give a folder with data, other data, a finished run, checkpoints and teachers."""
    folder = tmp_path_factory.mktemp("flags")
    shutil.copytree(tree(count=12, side=32), folder / "data")
    shutil.copytree(tree(count=10, side=40), folder / "other")
    for split in ("train", "val"):
        shutil.copy(GOLDEN / "legacy_digits.lmdb", folder / "data" / f"{split}.lmdb")
    with contextlib.chdir(folder):
        assert main.main([*TINY.split(), "--output_dir", "run"]) == 0
        assert main.main([*TINY.split(), *EVIT.split(), "--output_dir", "evit"]) == 0
        saved = torch.load("run/checkpoint.pth")
        torch.save({k: v for k, v in saved.items() if k != "epoch"}, "old.pth")
        for name, teacher in (("teacher", "test_resnet"), ("teacher2", "test_resnet"), ("byob", "test_byobnet")):
            torch.save(timm.create_model(teacher, num_classes=2).state_dict(), f"{name}.pth")
    return folder


def observe(flags: list[str], capsys) -> tuple:
    """Run main.py; give status, words without times, and every file left, checkpoints as their weights."""
    capsys.readouterr()
    status = main.main(flags)
    words = re.sub(
        r"images_per_s \S+|data \d+%|left \S+|Trained for \S+|[\d.]+ images/s.*", "", capsys.readouterr().out
    )
    files = {}
    for path in sorted(Path().rglob("out*/*.*")):
        files[str(path)] = path.suffix == ".pth" and {k: v.tolist() for k, v in torch.load(path)["model"].items()}
    return status, words, files


@pytest.mark.parametrize("flag", RUNS)
def test_setting_a_flag_changes_what_a_run_does(flag, place, tmp_path, monkeypatch, capsys):
    value, context = RUNS[flag]
    measure = functools.partial(engine.benchmark, min_seconds=0.01)
    monkeypatch.setattr(report, "benchmark", measure)
    context = [*TINY.split(), *context.replace("STUDENT", STUDENT).replace("EVIT", EVIT).split()]
    found = []
    for i, given in enumerate(([], [flag, *value.split()])):
        work = tmp_path / str(i)
        work.mkdir()
        for path in place.iterdir():
            (work / path.name).symlink_to(path)
        monkeypatch.chdir(work)
        found.append(observe([*context, *([] if flag == "--output_dir" else ["--output_dir", "out"]), *given], capsys))
    assert [status for status, _, _ in found] == [0, 0]
    assert found[0] != found[1]


def test_device_chooses_the_device():
    assert builders.find_amp_dtype("auto", main.distributed.pick_device("cpu")) is None
    with pytest.raises(InputError, match="--device gpu"):
        main.distributed.pick_device("gpu")


def test_inat_category_chooses_what_a_class_is():
    args = options.parse(["--data-set", "INAT", "--data-path", "x", "--inat-category", "order"])
    assert args.inat_category == "order" and options.parse(["--data-set", "DIGITS"]).inat_category == "name"


@pytest.mark.parametrize(
    ("flags", "pinned"), [([], True), (["--no-pin-mem"], False), (["--no-pin-mem", "--pin-mem"], True)]
)
def test_pinned_memory_is_for_accelerators(flags, pinned, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert loader(options.parse([*BASE, "--num_workers", "0", *flags]))[-1] is pinned


def test_the_average_can_stay_on_the_cpu(tiny_flags, monkeypatch):
    seen = []
    ema = train_module.ModelEmaV3
    monkeypatch.setattr(train_module, "ModelEmaV3", lambda *a, **k: seen.append(k["device"]) or ema(*a, **k))
    for flags in ([], ["--model-ema-force-cpu"]):
        assert main.main([*tiny_flags, "--batch-size", "512", *flags]) == 0
    assert seen == [None, CPU]


def test_the_backend_can_be_chosen(monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main.main([*BASE, "--dist-backend", "pigeons"]) == 2
    assert "pigeons" in capsys.readouterr().err


def test_speed_flags_reach_the_run(tiny_flags, monkeypatch):
    seen = []

    def train(model, criterion, loader, optimizer, precision, *args):
        seen.append((precision.channels_last, model.blocks[0].grad_checkpointing, torch.get_float32_matmul_precision()))
        return {"train_loss": 1.0, "train_lr": 1.0}

    monkeypatch.setattr(engine, "train_one_epoch", train)
    monkeypatch.setattr(nn.Module, "compile", lambda module: seen.append("compiled"))
    for flags in ([], ["--channels-last", "--grad-checkpointing", "--tf32"], ["--compile"]):
        try:
            assert main.main([*tiny_flags, *flags]) == 0
        finally:
            torch.set_float32_matmul_precision("highest")
    # with --compile, the model and its average
    assert seen == [(False, False, "highest"), (True, True, "high"), "compiled", "compiled", (False, False, "highest")]


def test_speed_is_measured_at_a_batch_size_of_its_own(tiny_flags, monkeypatch):
    seen = []
    measure = functools.partial(engine.benchmark, min_seconds=0.01)
    monkeypatch.setattr(report, "benchmark", lambda *a, **k: seen.append(a[2]) or measure(*a, **k))
    for flags in ([], ["--speed-batch-size", "3"]):
        assert main.main([*tiny_flags, "--batch-size", "2", "--only_test_speed", *flags]) == 0
    assert seen == [2, 2, 3, 3]


def test_flags_of_survival_reach_the_run(tiny_flags, monkeypatch, tmp_path):
    seen = []

    def train(args, saved, source, size, precision, preemption):
        seen.append((torch.are_deterministic_algorithms_enabled(), preemption.interval, args.on_bad_image))

    monkeypatch.setattr(main.training, "train", train)
    monkeypatch.setattr(main.distributed, "init", lambda *a: seen.append(a[2]) or init(*a))
    try:
        for flags in ("", "--deterministic --checkpoint-interval 0.5 --dist-timeout 7 --on-bad-image skip"):
            assert main.main([*tiny_flags, "--output_dir", str(tmp_path / "out"), *flags.split()]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [600.0, (False, None, "error"), 7.0, (True, 0.5, "skip")]


SPECIAL = {
    "--deterministic": test_flags_of_survival_reach_the_run,
    "--checkpoint-interval": test_flags_of_survival_reach_the_run,
    "--dist-timeout": test_flags_of_survival_reach_the_run,
    "--on-bad-image": test_flags_of_survival_reach_the_run,
    "--compile": test_speed_flags_reach_the_run,
    "--channels-last": test_speed_flags_reach_the_run,
    "--grad-checkpointing": test_speed_flags_reach_the_run,
    "--tf32": test_speed_flags_reach_the_run,
    "--speed-batch-size": test_speed_is_measured_at_a_batch_size_of_its_own,
    "--device": test_device_chooses_the_device,
    "--inat-category": test_inat_category_chooses_what_a_class_is,
    "--pin-mem": test_pinned_memory_is_for_accelerators,
    "--no-pin-mem": test_pinned_memory_is_for_accelerators,
    "--model-ema-force-cpu": test_the_average_can_stay_on_the_cpu,
    "--dist-backend": test_the_backend_can_be_chosen,
}
NO_EFFECT = {
    "--resplit": "",
    "--dist-eval": "",
    "--world_size": "2",
    "--dist_url": "tcp://1.2.3.4:5",
    "--local_rank": "1",
    "--cooldown-epochs": "3",
    "--patience-epochs": "3",
}


@pytest.mark.parametrize("flag", NO_EFFECT)
def test_a_flag_without_effect_is_taken_and_said(flag):
    args = options.parse([*BASE, flag, *NO_EFFECT[flag].split()])
    (line,) = options.without_effect(args)
    assert line.startswith(f"{flag} has no effect: ")
    assert rates(options.parse([*BASE, "--epochs", "12"])) == rates(
        options.parse([*BASE, "--epochs", "12", flag, *NO_EFFECT[flag].split()])
    )


REFUSED = {
    "--base_keep_rate": "0.5",
    "--fuse_token": "",
    "--drop_loc": "3,6",
    "--shrink_start_epoch": "1",
    "--shrink_epochs": "5",
    "--visualize_mask": "",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_flags_of_token_reorganisation_are_refused_for_models_without_it(flag):
    match = f"{flag} is for models that reorganise tokens, .*: take deit_base_patch16_shrink_base, deit_small_patch16_"
    with pytest.raises(InputError, match=match):
        options.parse([*BASE, flag, *REFUSED[flag].split()])


def all_flags() -> dict[str, argparse.Action]:
    return {a.option_strings[0]: a for a in options.build_parser()._actions if "--help" not in a.option_strings}


def test_every_flag_has_its_row():
    rows = [*PROBED, *RUNS, *SPECIAL, *NO_EFFECT]
    assert len(rows) == len(set(rows)) and set(rows) == set(all_flags())


NOT_HERE = {"cosub", "attn_only", "distributed"}  # the specification leaves them out
OTHER_DEFAULTS = {"device": None, "data_path": None, "input_size": None, "num_workers": None}


def test_published_flags_keep_spelling_type_default_and_choices():
    ours = {s: a for a in all_flags().values() for s in a.option_strings}
    for row in json.loads((GOLDEN / "cli_flags.json").read_text()):
        if row["dest"] in NOT_HERE:
            assert row["flags"][0] not in ours
            continue
        for flag in row["flags"]:
            action = ours[flag]
            assert action.dest == row["dest"], flag
            assert action.default == OTHER_DEFAULTS.get(row["dest"], row["default"]), flag
            assert (action.nargs == 0) == (row["nargs"] == "switch"), flag
            if row["nargs"] != "switch":
                assert (action.type or str).__name__ == (row["type"] or "str"), flag
            if row["choices"]:
                assert set(row["choices"]) <= set(action.choices), flag
