"""--config: a file of flags does what the same words do on the command line, and args.json repeats its run."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

import main
from util import options

SMALL = "--model dhvt_tiny_cifar_patch4 --data-set DIGITS"

# a file, and the command line that says the same
FILES = {
    "batch_size: 32\naccum-steps: 2": "--batch-size 32 --accum-steps 2",
    "data_set: cifar\nlr: 1e-3\nopt_eps: 1.0e-6": "--data-set CIFAR --lr 1e-3 --opt-eps 1e-6",
    "input-size: 64": "--input-size 64",
    "input-size: [64, 32]\nmean: [0.5, 0.4, 0.3]": "--input-size 64 32 --mean 0.5 0.4 0.3",
    "model: deit_tiny_patch16_shrink_base\ndrop_loc: [2, 5]": "--model deit_tiny_patch16_shrink_base --drop_loc 2,5",
    "model: deit_tiny_patch16_shrink_base\ndrop_loc: 2,5": "--model deit_tiny_patch16_shrink_base --drop_loc 2,5",
    "eval: true\nresume: a b.pth": ("--eval", "--resume", "a b.pth"),
    "model_ema: false\nno-repeated-aug: true\nunscale_lr: true": "--no-model-ema --no-repeated-aug --unscale-lr",
    "model-ema: true\nunscale_lr: false": "--model-ema",
    "clip_grad: null\nlayer_decay: ~\nhflip:": "",
    "amp: off\naa: none": "--amp off --aa none",
    "finetune: -x\nfreeze: 2": "--finetune=-x --freeze 2",
    "model_kwargs: {depth: 2, daff: false, aggregate: all, sizes: [1, 2]}\nopt-kwargs: {amsgrad: true, eps2: 1e-3}": (
        "--model-kwargs depth=2 daff=false aggregate=all sizes=[1,2] --opt-kwargs amsgrad=true eps2=0.001"
    ),
    '{"epochs": 7, "lr": 0.001, "scale": [0.2, 1], "bce_loss": true, "smoothing": 0}': (
        "--epochs 7 --lr 0.001 --scale 0.2 1 --bce-loss --smoothing 0"
    ),
}


def parse(words: list[str] | tuple[str] | str) -> dict:
    """Return the flags of a command line without --config."""
    args = vars(options.parse(words.split() if isinstance(words, str) else words))
    return {name: value for name, value in args.items() if name != "config"} | {"given": args["given"] - {"config"}}


@pytest.mark.parametrize("text", FILES)
def test_a_file_is_as_if_it_had_been_typed(text, tmp_path):
    path = tmp_path / ("flags.json" if text.startswith("{") else "flags.yaml")
    path.write_text(text)
    assert parse(["-c", str(path)]) == parse(FILES[text])


def test_flags_of_the_command_line_win_wherever_they_stand(tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text("epochs: 7\nmodel_ema: false\nmodel_kwargs: {depth: 2, embed_dim: 96}\nbatch_size: 32")
    typed = "--epochs 9 --model-ema --model-kwargs depth=3"
    expected = parse(f"--no-model-ema --model-kwargs embed_dim=96 --batch-size 32 {typed}")
    assert parse(f"{typed} --config {path}") == parse(f"--config={path} {typed}") == expected
    assert (expected["epochs"], expected["batch_size"], expected["model_ema"]) == (9, 32, True)


# what a run may have been started with; those with checks that a default must not meet among them
RUNS = (
    SMALL,
    f"{SMALL} --crop pad --hflip 0.2 --mean 0.5 0.5 0.5",
    f"{SMALL} --folds 3 --fold 1 --no-model-ema --no-repeated-aug --aa none --opt-betas 0.8 0.9",
    "--model deit_tiny_patch16_shrink_base --drop_loc 2,5 --fuse_token --shrink_epochs 3",
    "--data-set FOLDER --data-path x --train-split training --model-kwargs embed_dim=48 sizes=[1,2] daff=false",
    "--opt sgd --opt-kwargs nesterov=true --compile --torchcompile-mode max-autotune --clip-grad 1 --finetune x.pth",
)


@pytest.mark.parametrize("flags", RUNS)
def test_a_record_repeats_its_flags_but_not_its_place(flags, tmp_path):
    place = "--output_dir out --resume auto --start_epoch 2 --device cuda:1"
    args = vars(options.parse(f"{flags} {place}".split()))
    # as main.py adds to it, and resolves; another default of then counts
    args["given"] = sorted(args["given"])
    args["amp"] = "bf16"
    args |= {"effective_batch": 64, "effective_lr": 1e-4, "n_parameters": 5, "processes": 1, "precision": "float32"}
    args |= {"device": "cpu (of some kind)", "versions": {"torch": "2"}, "epochs": 200}
    path = tmp_path / "args.json"
    path.write_text(json.dumps(args))
    assert parse(["-c", str(path)]) == parse(f"{flags} --epochs 200")


def test_a_run_is_repeated_from_its_folder(tiny_run, tmp_path):
    flags = ["--config", os.fspath(tiny_run / "args.json"), "--output_dir", os.fspath(tmp_path / "out")]
    assert main.main([*flags, "--device", "cpu"]) == 0
    before, after = (torch.load(folder / "checkpoint.pth") for folder in (tiny_run, tmp_path / "out"))
    for name, tensor in before["model"].items():
        assert torch.equal(after["model"][name], tensor), name
    changed = {name for name, value in before["args"].items() if after["args"][name] != value}
    assert changed == {"config", "given", "output_dir"}


def test_the_documented_file_is_one(tmp_path):
    page = (Path(main.__file__).parent / "docs" / "configuration.md").read_text()
    text = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yaml").write_text(text)
    args = parse(["-c", str(tmp_path / "recipe.yaml")])
    content = yaml.safe_load(text)
    assert args["given"] == {name.replace("-", "_") for name in content}
