"""EViT through main.py: the keep rate in training, evaluation and resuming, the published commands, pictures."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from test_distributed import finish, start, torchrun

import datasets
import engine
import main
from data.transforms import DeviceTransform
from models.build import load_trained
from util import checkpoint, command
from util.config import DataConfig
from util.keep_rate import keep_rate_at
from util.precision import Precision

ROOT = Path(__file__).parent.parent
SHAPE = "--model-kwargs patch_size=8 embed_dim=32 depth=3 num_heads=2 --input-size 32 --data-set DIGITS --device cpu"
SHAPE += " --num_workers 0"
EVIT = f"--model deit_tiny_patch16_shrink_base {SHAPE} --drop_loc 1 --no-repeated-aug --batch-size 128"
EVIT += " --warmup-epochs 0 --aa none --print-freq 1 --base_keep_rate 0.5 --shrink_start_epoch 1 --shrink_epochs 1"
EVIT += " --no-model-ema"


def read_scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """Read a curve of TensorBoard's files: step and value."""
    found = []
    for path in folder.glob("runs/events*"):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, value.simple_value) for value in event.summary.value if value.tag == name]
            at += 16 + length
    return sorted(found)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[float]]:
    """Give the folder of three epochs that shrink in the second, and the rates that the model was called at."""
    folder, rates = tmp_path_factory.mktemp("evit"), []
    forward = timm.create_model

    def watched(*args, **kwargs):
        model = forward(*args, **kwargs)
        model.register_forward_pre_hook(lambda m, inputs: rates.append((m.training, *inputs[1:])))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", watched)
        assert main.main([*EVIT.split(), "--epochs", "3", "--output_dir", str(folder)]) == 0
    return folder, rates


def test_training_follows_the_schedule_update_by_update(run):
    folder, rates = run
    expected = [keep_rate_at(i, 1, 2, 11, 0.5) for i in range(33)]  # 1,437 digits are 11 batches of 128
    assert [rate for training, rate in rates if training] == expected
    curve = read_scalars(folder, "keep_rate")
    assert [step for step, _ in curve] == list(range(33))
    assert [value for _, value in curve] == pytest.approx(expected, abs=1e-6)


def test_evaluation_in_training_is_at_the_rate_then_in_force(run):
    folder, rates = run
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    in_force = [keep_rate_at(i, 1, 2, 11, 0.5) for i in (10, 21, 32)]
    assert [line["keep_rate"] for line in log] == in_force and in_force[0] == 1 and in_force[2] == 0.5
    evaluated = [rate for training, rate in rates if not training]
    assert list(dict.fromkeys(evaluated)) == in_force


def test_the_accuracy_of_the_last_epoch_is_that_of_the_checkpoint_at_the_base_rate(run, capsys):
    folder, _ = run
    last = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    capsys.readouterr()
    assert main.main([*EVIT.split(), "--eval", "--resume", str(folder / "checkpoint.pth")]) == 0
    assert f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} loss {last['test_loss']:.3f}" in (
        capsys.readouterr().out
    )


def test_the_best_epoch_is_of_the_lowest_keep_rate():
    state = checkpoint.TrainState(*[None] * 5, config=None, data=None, classes=[], args={}, updates=1)
    best = []
    for rate, accuracy in [(1, 90), (1, 80), (0.8, 70), (0.5, 50), (0.5, 60), (0.5, 55)]:
        state.keep_rate = rate
        best.append("best_checkpoint.pth" in state.finish_epoch({"test_acc1": accuracy, "test_ema_acc1": accuracy - 1}))
    assert best == [True, False, True, True, True, False]
    assert (state.max_accuracy, state.max_accuracy_ema, state.best_epoch_ema) == (60, 59, 4)
    state.keep_rate = 0.4
    assert state.finish_epoch({}) == [] and state.best_epoch == 4


def test_the_last_line_names_a_command_that_sees_the_best_accuracy_again(tmp_path, capsys):
    flags = [*EVIT.split(), "--fuse_token", "--epochs", "2", "--output_dir", str(tmp_path / "run")]
    assert main.main(flags) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    best = re.search(r"Best accuracy ([\d.]+)% \(epoch 1, keep rate ([\d.]+)\)", line)
    command = line.split("evaluate it with: python main.py ")[1].split()
    assert main.main([*command, "--device", "cpu", "--num_workers", "0"]) == 0
    assert f"{float(best[1]):.1f}%" in capsys.readouterr().out


def test_a_killed_shrinking_phase_goes_on_at_its_rate(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    for name in ("checkpoint.pth", "checkpoint_0002.pth", "best_checkpoint.pth"):
        (tmp_path / "run" / name).unlink()
    again = ["--epochs", "3", "--output_dir", str(tmp_path / "run"), "--resume", "auto"]
    assert main.main([*EVIT.split(), *again]) == 0
    whole, resumed = (torch.load(f / "checkpoint.pth") for f in (folder, tmp_path / "run"))
    for name, tensor in whole["model"].items():
        assert torch.equal(resumed["model"][name], tensor), name
    assert resumed["best_keep_rate"] == whole["best_keep_rate"] == 0.5


def test_keep_rate_one_is_the_plain_transformer(run, capsys):
    folder, _ = run
    found = []
    for model in ("deit_tiny_patch16_shrink_base --drop_loc 1 --base_keep_rate 1", "deit_tiny_patch16_224"):
        capsys.readouterr()
        words = f"--model {model} {SHAPE} --eval --resume {folder / 'checkpoint.pth'}"
        assert main.main(words.split()) == 0
        found.append(re.search(r"\* Acc@1.*", capsys.readouterr().out)[0])
    assert found[0] == found[1]


def test_a_checkpoint_is_evaluated_at_another_size(run, capsys):
    """The position embedding is resampled as EViT does by itself for images of another size."""
    folder, _ = run
    capsys.readouterr()
    flags = ["--device", "cpu", "--num_workers", "0", "--input-size", "40", "24", "--base_keep_rate", "0.5"]
    assert main.main([*flags, "--eval", "--resume", str(folder / "checkpoint.pth")]) == 0
    out = capsys.readouterr().out
    trained = load_trained(folder / "checkpoint.pth")
    precision = Precision(torch.device("cpu"))
    config = replace(trained.config, input_size=(40, 24), crop_ratio=0.875)
    val_set = datasets.build_val_set(DataConfig("DIGITS", num_workers=0), config)
    loader = datasets.build_val_loader(val_set, DataConfig("DIGITS", num_workers=0), batch_size=64)
    found = engine.evaluate(trained.model, loader, precision, prepare=DeviceTransform(config, precision))
    assert f"* Acc@1 {found['acc1']:.3f} Acc@5 {found['acc5']:.3f} loss {found['loss']:.3f}" in out


def test_fine_tuning_starts_from_deits_weights_at_the_base_rate(tmp_path, capsys):
    deit = timm.create_model("deit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=3, num_heads=2, img_size=48)
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    flags = [
        *EVIT.split(),
        "--finetune",
        str(tmp_path / "deit.pth"),
        "--shrink_start_epoch",
        "0",
        "--shrink_epochs",
        "0",
    ]
    assert main.main([*flags, "--epochs", "1", "--output_dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\d+ matched", out) and "head.weight" in out
    assert {value for _, value in read_scalars(tmp_path / "run", "keep_rate")} == {0.5}


@pytest.mark.parametrize(
    ("text", "blocks"), [("(3, 6, 9)", (3, 6, 9)), ("3,6,9", (3, 6, 9)), ("(4,)", (4,)), ("5", (5,)), ("()", ())]
)
def test_drop_loc_reads_what_the_scripts_and_people_write(text, blocks):
    assert command.parse_block_numbers(text) == blocks


@pytest.mark.parametrize("text", ["three", "3;6", "-1", "1.5", "__import__('os')"])
def test_drop_loc_is_numbers_and_nothing_is_evaluated(text, capsys):
    assert main.main(["--only_test_speed", "--model", "deit_tiny_patch16_shrink_base", "--drop_loc", text]) == 2
    assert "--drop_loc" in capsys.readouterr().err


# ---- the two commands of the published README, and pictures


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """Give a folder with a tree of JPEGs of uneven sizes and modes, and a checkpoint of three classes beside it."""
    from sklearn.datasets import load_sample_images

    root, rng = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    photographs = [Image.fromarray(p) for p in load_sample_images().images]
    for split, count in (("train", 2), ("val", 24)):
        for k, name in enumerate(("ant", "bee", "cat")):
            folder = root / "imagenet" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                width, height = rng.integers(40, 400, 2)
                image = photographs[i % 2].resize((int(width), int(height))).convert(("RGB", "L", "CMYK")[(i + k) % 3])
                image.save(folder / f"{i:02}.JPEG", format="JPEG")
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_shrink_base", num_classes=3)
    torch.save({"model": model.state_dict()}, root / "checkpoint")
    return root


COMMAND = (
    "--model deit_small_patch16_shrink_base --fuse_token --base_keep_rate 0.7 {} --resume checkpoint --data-path {}"
)


def test_the_published_evaluation_runs_as_it_stands(imagenet, monkeypatch, capsys):
    monkeypatch.chdir(imagenet)
    assert main.main(COMMAND.format("--eval", imagenet / "imagenet").split()) == 0
    alone = re.search(r"\* Acc@1.*\n.*the 72 test images.*", capsys.readouterr().out)[0]
    words = COMMAND.format("--eval", imagenet / "imagenet").split()
    status, out, err = torchrun(2, *words, cwd=imagenet)
    assert status == 0, err
    assert alone in out


def test_the_published_pictures_run_as_they_stand(imagenet, tmp_path, monkeypatch, capsys):
    words = COMMAND.format("--visualize_mask --n_visualization 64", imagenet / "imagenet").split()
    words[words.index("checkpoint")] = str(imagenet / "checkpoint")
    (tmp_path / "alone").mkdir()
    monkeypatch.chdir(tmp_path / "alone")
    assert main.main(words) == 0
    assert "257 pictures of 64 images are in visualization; open visualization/contact_sheet.png first" in (
        capsys.readouterr().out
    )
    (tmp_path / "two").mkdir()
    status, _, err = torchrun(2, *words, cwd=tmp_path / "two")
    assert status == 0, err
    alone, two = (
        {p.name: p.read_bytes() for p in (tmp_path / name / "visualization").iterdir()} for name in ("alone", "two")
    )
    assert len(alone) == 4 * 64 + 1 and alone == two


def test_pictures_need_no_labels(imagenet, tmp_path, capsys):
    words = (
        "--model deit_small_patch16_shrink_base --fuse_token --visualize_mask --n_visualization 5 --input-size 96 64"
    )
    words = [*words.split(), "--resume", str(tmp_path / "small"), "--image-dir", str(imagenet / "imagenet")]
    model = timm.create_model("deit_small_patch16_shrink_base", num_classes=3, img_size=(96, 64))
    torch.save({"model": model.state_dict()}, tmp_path / "small")
    assert main.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    pictures = sorted((tmp_path / "out" / "visualization").iterdir())
    assert len(pictures) == 4 * 5 + 1
    assert {Image.open(p).size for p in pictures if "sheet" not in p.name} == {(64, 96)}


def test_fewer_images_than_asked_for_are_all_shown_and_said(tiny_run, tmp_path, tree, capsys):
    root = tree(count=2, side=40)
    words = "--model dhvt_tiny_cifar_patch4 --model-kwargs depth=1 embed_dim=32 num_heads=2 --visualize_attention"
    words += f" --device cpu --image-dir {root} --resume {tiny_run / 'checkpoint.pth'} --output_dir {tmp_path / 'out'}"
    assert main.main(words.split()) == 0
    assert "17 pictures of 8 images" in capsys.readouterr().out


@pytest.mark.slow  # four minutes
def test_on_the_digits_half_the_tokens_are_as_good_as_all(tmp_path):
    """The recipes as the README has them: at least 95 %, then with equal budget within a point of each other."""
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CKPT": str(tmp_path / "whole.pth")}

    def train(script: str, name: str, *flags: str) -> dict:
        command = ["bash", str(ROOT / script), "digits-evit", *flags]
        status, _, err = finish(start(command, OUT=str(tmp_path / name), **env | {"OMP_NUM_THREADS": "2"}), 900)
        assert status == 0, err
        return json.loads((tmp_path / name / "log.txt").read_text().splitlines()[-1])

    assert train("run_code.sh", "whole")["test_acc1"] >= 95
    shutil.copy(tmp_path / "whole" / "best_checkpoint.pth", tmp_path / "whole.pth")
    fewer = train("finetune.sh", "fewer")
    whole = train("finetune.sh", "all", "--base_keep_rate", "1")
    assert (fewer["keep_rate"], whole["keep_rate"]) == (0.7, 1.0)
    assert abs(fewer["test_acc1"] - whole["test_acc1"]) <= 1 and fewer["test_acc1"] >= 95
    saved = torch.load(tmp_path / "fewer" / "checkpoint.pth")
    kwargs = {"patch_size": 4, "embed_dim": 64, "num_heads": 2, "depth": 6, "img_size": 28, "num_classes": 10}
    model = timm.create_model(saved["args"]["model"], drop_loc=(2, 4), base_keep_rate=0.7, fuse_token=True, **kwargs)
    model.load_state_dict(saved["model"])
    tokens = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: tokens.append(output.shape[1] - 1))
    model.eval()(torch.zeros(1, 3, 28, 28))
    assert tokens == [49, 49, 36, 36, 27, 27]
