"""EViT through main.py: the keep rate in training, evaluation and resuming, the published commands, pictures."""

import contextlib
import io
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from conftest import read_scalars
from test_distributed import finish, start, torchrun

import datasets
import engine
import main
from data.transforms import DeviceTransform
from models.build import build_model, load_trained
from util import checkpoint, command
from util.config import DataConfig, ModelConfig
from util.keep_rate import keep_rate_at
from util.precision import Precision

ROOT = Path(__file__).parent.parent
SHAPE = "--model-kwargs patch_size=8 embed_dim=32 depth=3 num_heads=2 --input-size 32 --data-set DIGITS --device cpu"
SHAPE += " --num_workers 0"
EVIT = f"--model deit_tiny_patch16_shrink_base {SHAPE} --drop_loc 1 --no-repeated-aug --batch-size 128"
EVIT += " --warmup-epochs 0 --aa none --print-freq 1 --base_keep_rate 0.5 --shrink_start_epoch 1 --shrink_epochs 1"
EVIT += " --no-model-ema --fuse_token"


class Run(NamedTuple):
    folder: Path
    rates: list[tuple]  # of each call of the model: training or not, and the keep rate
    last_line: str


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Run three epochs that shrink in the second; evaluating.pth is checkpoint.pth in the first evaluation."""
    folder = tmp_path_factory.mktemp("evit")
    rates = []
    create = timm.create_model
    out = io.StringIO()

    def watched(*args, **kwargs):
        model = create(*args, **kwargs)
        model.register_forward_pre_hook(watch)
        return model

    def watch(model, inputs):
        rates.append((model.training, *inputs[1:]))
        if not model.training and not (folder / "evaluating.pth").exists():
            shutil.copy(folder / "checkpoint.pth", folder / "evaluating.pth")

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(timm, "create_model", watched)
        assert main.main([*EVIT.split(), "--epochs", "3", "--output_dir", str(folder)]) == 0
    return Run(folder, rates, out.getvalue().splitlines()[-1])


def test_training_and_its_evaluation_follow_the_schedule_update_by_update(run):
    expected = [keep_rate_at(i, 1, 2, 11, 0.5) for i in range(33)]  # 1,437 digits are 11 batches of 128
    assert [rate for training, rate in run.rates if training] == expected
    curve = read_scalars(run.folder, "keep_rate")
    assert [step for step, _ in curve] == list(range(33))
    assert [value for _, value in curve] == pytest.approx(expected, abs=1e-6)
    log = [json.loads(line) for line in (run.folder / "log.txt").read_text().splitlines()]
    in_force = [expected[10], expected[21], expected[32]]
    assert [line["keep_rate"] for line in log] == in_force and in_force[0] == 1 and in_force[2] == 0.5
    evaluated = [rate for training, rate in run.rates if not training]
    assert list(dict.fromkeys(evaluated)) == in_force


def test_the_best_epoch_is_of_the_lowest_keep_rate():
    state = checkpoint.TrainState(*[None] * 5, config=None, data=None, classes=[], args={}, updates_per_epoch=1)
    best = []
    for rate, accuracy in [(1, 90), (1, 80), (0.8, 70), (0.5, 50), (0.5, 60), (0.5, 55)]:
        state.keep_rate = rate
        best.append("best_checkpoint.pth" in state.finish_epoch({"test_acc1": accuracy, "test_ema_acc1": accuracy - 1}))
    assert best == [True, False, True, True, True, False]
    assert (state.max_accuracy, state.max_accuracy_ema, state.best_epoch_ema) == (60, 59, 4)
    state.keep_rate = 0.4
    assert state.finish_epoch({}) == [] and state.best_epoch == 4


def test_the_last_line_names_a_command_that_sees_the_best_accuracy_again(run, capsys):
    best = re.search(r"Best accuracy ([\d.]+)% \(epoch 2, keep rate 0.5\)", run.last_line)
    command = run.last_line.split("evaluate it with: python main.py ")[1].split()
    assert main.main([*command, "--device", "cpu", "--num_workers", "0"]) == 0
    out = capsys.readouterr().out
    last = json.loads((run.folder / "log.txt").read_text().splitlines()[-1])
    assert f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} loss {last['test_loss']:.3f}" in out
    assert float(best[1]) == pytest.approx(last["test_acc1"], abs=0.06)


def test_a_killed_shrinking_phase_goes_on_at_its_rate(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    for name in ("checkpoint.pth", "checkpoint_0002.pth", "best_checkpoint.pth"):
        (tmp_path / "run" / name).unlink()
    again = ["--epochs", "3", "--output_dir", str(tmp_path / "run"), "--resume", "auto"]
    assert main.main([*EVIT.split(), *again]) == 0
    whole, resumed = (torch.load(f / "checkpoint.pth") for f in (run.folder, tmp_path / "run"))
    for name, tensor in whole["model"].items():
        assert torch.equal(resumed["model"][name], tensor), name
    assert resumed["best_keep_rate"] == whole["best_keep_rate"] == 0.5


def test_a_run_killed_in_an_evaluation_repeats_it_at_the_rate_of_its_epoch(run, tmp_path):
    saved = run.folder / "evaluating.pth"
    assert torch.load(saved)["position"]["update"] == 11
    flags = ["--epochs", "1", "--output_dir", str(tmp_path), "--resume", str(saved)]
    assert main.main([*EVIT.split(), *flags]) == 0
    first, repeated = (json.loads((f / "log.txt").read_text().splitlines()[0]) for f in (run.folder, tmp_path))
    for key in ("epoch", "test_loss", "test_acc1", "keep_rate"):
        assert repeated[key] == first[key], key


def test_a_checkpoint_is_evaluated_at_another_size(run, capsys):
    """The position embedding is resampled as EViT does by itself for images of another size."""
    saved = run.folder / "checkpoint.pth"
    flags = ["--device", "cpu", "--num_workers", "0", "--input-size", "40", "24", "--base_keep_rate", "0.5"]
    assert main.main([*flags, "--eval", "--resume", str(saved)]) == 0
    out = capsys.readouterr().out
    trained = load_trained(saved)
    precision = Precision(torch.device("cpu"))
    config = replace(trained.config, input_size=(40, 24), crop_ratio=0.875)
    val_set = datasets.build_val_set(DataConfig("DIGITS", num_workers=0), config)
    loader = datasets.build_val_loader(val_set, DataConfig("DIGITS", num_workers=0), batch_size=64)
    found = engine.evaluate(trained.model, loader, precision, prepare=DeviceTransform(config, precision))
    assert f"* Acc@1 {found['acc1']:.3f} Acc@5 {found['acc5']:.3f} loss {found['loss']:.3f}" in out


def test_fine_tuning_starts_from_deits_weights_at_the_base_rate(tmp_path, capsys):
    deit = timm.create_model("deit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=3, num_heads=2, img_size=48)
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    words = f"--finetune {tmp_path / 'deit.pth'} --shrink_start_epoch 0 --shrink_epochs 0 --epochs 1 --output_dir"
    assert main.main([*EVIT.split(), *words.split(), str(tmp_path / "run")]) == 0
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


# the two commands of the published README, and pictures


@pytest.mark.slow
def test_the_published_commands_run_as_they_stand_in_one_and_in_two_processes(tree, tmp_path):
    root = tree(("ant", "bee", "cat"), count=24)
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_shrink_base", num_classes=3)
    command = "--model deit_small_patch16_shrink_base --fuse_token --base_keep_rate 0.7 {} --resume checkpoint"
    outputs = []
    for flags in ("--eval", "--visualize_mask --n_visualization 64"):
        words = [*command.format(flags).split(), "--data-path", str(root)]
        for processes in (1, 2):
            folder = tmp_path / str(processes)
            folder.mkdir(exist_ok=True)
            torch.save({"model": model.state_dict()}, folder / "checkpoint")
            status, out, err = torchrun(processes, *words, cwd=folder)
            assert status == 0, err
            outputs.append(out)
    alone = re.search(r"\* Acc@1.*\n.*on 72 images.*", outputs[0])[0]
    assert alone in outputs[1]
    assert "65 pictures of 64 images are in visualization" in outputs[2]
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name / "visualization").iterdir()} for name in "12")
    assert len(one) == 64 + 1 and one == two


def test_pictures_need_no_labels_and_fewer_images_than_asked_for_are_all_shown(run, tree, tmp_path, capsys):
    words = f"--visualize_mask --device cpu --image-dir {tree(count=2)} --input-size 40 24 --output_dir {tmp_path}"
    assert main.main([*words.split(), "--resume", str(run.folder / "checkpoint.pth")]) == 0
    assert "9 pictures of 8 images" in capsys.readouterr().out
    names = [f"mask_{i:04}.png" for i in range(8)]
    assert sorted(path.name for path in (tmp_path / "visualization").iterdir()) == [*names, "mask_overview.png"]


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
    places = model.eval().trace_tokens(torch.zeros(1, 3, 28, 28))[1]
    assert [tokens.shape[1] for tokens in places.values()] == [36, 27]


@torch.no_grad()
def test_evits_weights_load_in_the_plain_transformer_too(tmp_path):
    kwargs = {"embed_dim": 48, "num_heads": 2, "depth": 4}
    config = ModelConfig(
        "deit_tiny_patch16_shrink_base", 5, (32, 32), kwargs | {"drop_loc": (1,), "base_keep_rate": 0.5}
    )
    evit = build_model(config).eval()
    torch.save({"config": asdict(config), "model": evit.state_dict()}, tmp_path / "evit.pth")
    plain = load_trained(tmp_path / "evit.pth", name="deit_tiny_patch16_224").model
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain(images), evit(images, keep_rate=1.0))
