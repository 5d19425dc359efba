"""Knobs of small images from the command line to the pixels: what a checkpoint keeps, and what changes by the epoch."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from conftest import SMALL, terminated_at
from PIL import Image
from test_resume import differences
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform, resolve_model_data_config
from torch import Tensor

import export
import main
import predict
from models.build import load_trained
from models.dhvt import DHVT
from util import options

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
KNOBS = "--mean 0.5 0.4 0.3 --std 0.2 0.25 0.3 --crop squash --input-size 32 24"
CPU = "--device cpu --num_workers 0"


@pytest.fixture(scope="module")
def data(tree) -> Path:
    return tree(count=3, side=40)


@pytest.fixture(scope="module")
def squashed(data, tmp_path_factory) -> Path:
    """Return the checkpoint of a run with other normalisation, of images squashed to 32 x 24; leave it as it is."""
    out = tmp_path_factory.mktemp("squashed")
    flags = f"{SMALL} --data-set FOLDER --data-path {data} --batch-size 4 --epochs 1 --warmup-epochs 0 {KNOBS}"
    assert main.main([*flags.split(), "--no-repeated-aug", "--output_dir", str(out)]) == 0
    return out / "checkpoint.pth"


@pytest.fixture
def shown() -> Iterator[Callable[[], Tensor]]:
    """Return a function that returns the images that DHVTs were called with since its last call."""
    images = []

    def record(module, args) -> None:
        if isinstance(module, DHVT):
            images.append(args[0])

    def take() -> Tensor:
        taken = torch.cat(images)
        images.clear()
        return taken

    hook = torch.nn.modules.module.register_module_forward_pre_hook(record)
    yield take
    hook.remove()


def val_files(data: Path) -> list[Path]:
    return sorted((data / "val").rglob("*.*"))


def expect(data: Path, mean: tuple, std: tuple, squash: bool = True) -> Tensor:
    """Return the validation images as the model should see them: resized by Pillow, normalised by hand."""
    images = []
    for file in val_files(data):
        image = Image.open(file).convert("RGB")
        if squash:
            image = image.resize((24, 32), Image.Resampling.BICUBIC)
        else:  # cover 32 x 24 in proportion, and cut out the center
            scale = max(24 / image.width, 32 / image.height)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
            left, top = round((image.width - 24) / 2), round((image.height - 32) / 2)
            image = image.crop((left, top, left + 24, top + 32))
        images.append((np.asarray(image) / 255 - mean) / std)
    return torch.tensor(np.stack(images), dtype=torch.float32).permute(0, 3, 1, 2)


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("transform", ["fast", "timm"])
def test_evaluation_predictions_and_pictures_see_what_was_trained_on(squashed, data, shown, tmp_path, transform):
    expected = expect(data, MEAN, STD)
    resume = f"--resume {squashed} --transform {transform} {CPU}"
    assert main.main(f"--eval {resume}".split()) == 0
    equal(shown(), expected)
    assert predict.main([*map(str, val_files(data)), "--checkpoint", str(squashed), *CPU.split()]) == 0
    equal(shown(), expected)
    for source in ("", f"--image-dir {data / 'val'}"):
        flags = f"--visualize attention --n_visualization 6 --output_dir {tmp_path} {resume} {source}"
        assert main.main(flags.split()) == 0
        equal(shown(), expected)


def test_exported_folders_and_graphs_say_how_images_are_prepared(squashed, data, shown, tmp_path):
    expected = expect(data, MEAN, STD)
    out = tmp_path / "exported"
    assert export.main(["--checkpoint", str(squashed), "--out", str(out), "--onnx"]) == 0
    shown()
    assert predict.main([*map(str, val_files(data)), "--checkpoint", str(out), *CPU.split()]) == 0
    equal(shown(), expected)
    # timm makes the same of it, without this repository
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    transform = create_transform(**resolve_model_data_config(model))
    equal(torch.stack([transform(Image.open(file).convert("RGB")) for file in val_files(data)]), expected)
    found = {entry.key: json.loads(entry.value) for entry in onnx.load(out / "model.onnx").metadata_props}
    assert (tuple(found["mean"]), tuple(found["std"])) == (MEAN, STD)
    assert (found["crop_mode"], found["crop_ratio"], found["input_size"]) == ("squash", 1.0, [32, 24])


def test_flags_that_are_given_win_over_the_checkpoint(squashed, data, shown):
    expected = expect(data, (0, 0, 0), (1, 1, 1))
    plain = "--mean 0 0 0 --std 1 1 1"
    assert main.main(f"--eval --resume {squashed} {plain} {CPU}".split()) == 0
    equal(shown(), expected)
    assert predict.main([*map(str, val_files(data)), *f"--checkpoint {squashed} {plain} {CPU}".split()]) == 0
    equal(shown(), expected)


def test_a_crop_ratio_that_is_given_wins_over_the_checkpoint(squashed, data, shown, tiny_run, tmp_path):
    """Half of each side is cut out of the middle, also where images come in the model's size."""
    images = []
    for file in val_files(data):
        image = Image.open(file).convert("RGB").resize((48, 64), Image.Resampling.BICUBIC)
        images.append((np.asarray(image.crop((12, 16, 36, 48))) / 255 - MEAN) / STD)
    expected = torch.tensor(np.stack(images), dtype=torch.float32).permute(0, 3, 1, 2)
    assert main.main(f"--eval --resume {squashed} --eval-crop-ratio 0.5 {CPU}".split()) == 0
    equal(shown(), expected)
    # digits are neither resized nor cropped
    file = tiny_run / "checkpoint.pth"
    assert load_trained(file).config.crop_ratio == 1 and load_trained(file, crop_ratio=0.5).config.crop_ratio == 0.5


def test_checkpoints_from_before_the_flags_are_evaluated_as_before(squashed, data, shown, tmp_path):
    saved = torch.load(squashed)
    del saved["config"]["crop_mode"]
    saved["config"] |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    torch.save(saved, tmp_path / "old.pth")
    assert main.main(f"--eval --resume {tmp_path / 'old.pth'} {CPU}".split()) == 0
    equal(shown(), expect(data, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, squash=False))
    assert load_trained(tmp_path / "old.pth").config.crop_mode == "center"


@pytest.mark.parametrize(
    ("flags", "ratio", "mode"),
    [
        ("", 0.875, "center"),
        ("--crop rrc", 0.875, "center"),
        ("--crop pad", 1.0, "center"),
        ("--crop squash", 1.0, "squash"),
        ("--crop squash --eval-crop-ratio 0.9", 0.9, "squash"),
    ],
)
def test_evaluation_shows_as_much_of_an_image_as_training(flags, ratio, mode):
    config = options.model_config(options.parse(["--data-set", "DIGITS", *flags.split()]))
    assert (config.crop_ratio, config.crop_mode) == (ratio, mode)


def test_a_resumed_run_mixes_no_images_from_the_epoch_on_and_smooths_labels(quick_run, quick_flags, monkeypatch):
    mix = Mixup.__call__
    calls = []

    def record(mixup: Mixup, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        before = images.clone()
        mixed, soft = mix(mixup, images, targets)
        # two classes, smoothed by 0.1
        plain = torch.eye(2)[targets] * 0.9 + 0.05
        calls.append((torch.equal(mixed, before), torch.allclose(soft, plain)))
        return mixed, soft

    monkeypatch.setattr(Mixup, "__call__", record)
    resume = ["--resume", str(quick_run / "checkpoint.pth"), "--epochs", "3", "--mixup-off-epoch", "2"]
    assert main.main([*quick_flags, *resume]) == 0
    assert len(calls) == 36
    assert not any(all(call) for call in calls[:18]) and all(all(call) for call in calls[18:])


def test_an_ema_with_warmup_resumes_bit_for_bit(quick_flags, tmp_path):
    flags = [*quick_flags, "--model-ema-warmup", "--resume", "auto", "--output_dir"]
    assert main.main([*flags, str(tmp_path / "whole")]) == 0
    with terminated_at(25):
        assert main.main([*flags, str(tmp_path / "stopped")]) == 75
    assert torch.load(tmp_path / "stopped" / "checkpoint.pth")["position"]["update"] == 7
    assert main.main([*flags, str(tmp_path / "stopped")]) == 0
    one, two = (torch.load(tmp_path / name / "checkpoint.pth")["model_ema"] for name in ("whole", "stopped"))
    assert differences(one, two) == []


def test_an_ema_with_warmup_holds_no_initial_weights_and_nobody_is_warned(tiny_flags, capsys):
    """Eleven updates at 0.999 leave 99 % of them."""
    for more, warned in (([], 1), (["--model-ema-warmup"], 0)):
        assert main.main([*tiny_flags, "--model-ema-decay", "0.999", *more]) == 0
        assert capsys.readouterr().out.count("of the initial weights") == warned
