"""The scripts: what each recipe asks of main.py, and each published one run for a shortened epoch."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from util import options

ROOT = Path(__file__).parent.parent
PUBLISHED = {
    # recipe: model, data set, pixels, batch size per process, processes, learning rate, epochs, epochs of warm-up
    "folder": ("dhvt_tiny_imagenet_patch16", "FOLDER", None, 128, 2, 1e-3, 300, 20),
    "cifar100": ("dhvt_tiny_cifar_patch4", "CIFAR", 32, 256, 2, 1e-3, 300, 5),
    **{
        name: ("dhvt_tiny_domain_patch16", name, 224, 128, 2, 1e-3, 300, 20)
        for name in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    },
    "imagenet": ("dhvt_tiny_imagenet_patch16", "IMNET", 224, 128, 2, 5e-4, 300, 10),
    "finetune-clipart": ("dhvt_small_imagenet_patch16", "clipart", 224, 128, 2, 5e-4, 100, 2),
    "evit": ("deit_small_patch16_shrink_base", "IMNET", 224, 256, 8, 5e-4, 300, 5),
    "finetune-evit": ("deit_small_patch16_shrink_base", "IMNET", 224, 256, 8, 2e-5, 30, 0),
}
TUNED = {"finetune-clipart": (1e-8, 1e-6), "finetune-evit": (1e-6, 2e-6)}  # weight decay, least learning rate
SHRINKING = {"evit": (0.7, True, 10, 100), "finetune-evit": (0.7, True, 0, 0)}  # keep rate, fused, start, length
ALL = {*PUBLISHED, "digits", "digits-evit", "finetune-digits-evit"}


@pytest.fixture
def call(tmp_path):
    """Return a function that runs a script, with stand-ins for python and torchrun; it returns status, words, error."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text('#!/bin/sh\n[ "$1" = -c ] && { echo "${FOUND:-0}"; exit; }\necho "$0" "$@"\n')
        (tmp_path / name).chmod(0o755)

    def run(script: str, *words: str, **env: str) -> tuple[int, list[str], str]:
        clean = {k: v for k, v in os.environ.items() if k not in ("DATA", "OUT", "CKPT", "NGPU")}
        clean |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | env
        done = subprocess.run(["bash", str(ROOT / script), *words], env=clean, capture_output=True, text=True)
        return done.returncode, done.stdout.split(), done.stderr

    return run


@pytest.mark.parametrize("recipe", PUBLISHED)
@pytest.mark.parametrize("ngpu", [1, 8])
def test_recipes_ask_for_what_was_published(call, tmp_path, recipe, ngpu):
    (tmp_path / "c.pth").touch()
    ngpu = min(ngpu, PUBLISHED[recipe][4])
    env = {"DATA": str(tmp_path), "CKPT": str(tmp_path / "c.pth"), "NGPU": str(ngpu)}
    if recipe == "cifar100":
        env["DATA"] = str(tmp_path / "new")  # downloaded to a folder that need not exist
    status, words, error = call("run_code.sh", recipe, "--seed", "5", **env)
    assert status == 0, error
    launch = words[: words.index(next(w for w in words if w.endswith("main.py")))]
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    several = ["torchrun", "--standalone", signals, f"--nproc_per_node={ngpu}"]
    assert [Path(launch[0]).name, *launch[1:]] == (["python"] if ngpu == 1 else several)
    args = options.parse(words[len(launch) + 1 :])
    model, data, pixels, batch, processes, lr, epochs, warmup = PUBLISHED[recipe]
    assert (args.model, args.data_set, args.input_size, args.batch_size) == (model, data, pixels and [pixels], batch)
    assert (args.lr, args.epochs, args.warmup_epochs) == (lr, epochs, warmup)
    assert ngpu * args.accum_steps == processes
    assert (args.opt, args.seed, args.resume) == ("adamw", 5, "auto")
    assert args.output_dir == f"output/{recipe}" and args.data_path == env["DATA"]
    assert (args.weight_decay, args.min_lr) == TUNED.get(recipe, (0.05, 1e-5))
    assert args.repeated_aug is (recipe != "finetune-clipart")
    assert args.finetune == (str(tmp_path / "c.pth") if recipe in TUNED else "")
    shrinking = args.base_keep_rate, args.fuse_token, args.shrink_start_epoch, args.shrink_epochs
    assert shrinking == SHRINKING.get(recipe, (0.7, False, 10, 0))
    defaults = options.parse(["--data-set", "DIGITS"])
    for name in ("aa", "reprob", "mixup", "cutmix", "smoothing", "drop_path", "model_ema", "sched", "warmup_lr"):
        assert getattr(args, name) == getattr(defaults, name), name


def test_finetune_is_a_recipe_of_the_same_script(call, tmp_path):
    env = {"DATA": str(tmp_path), "CKPT": "https://example.org/c.pth", "NGPU": "1", "OUT": "elsewhere"}
    _, short, _ = call("finetune.sh", "--seed", "3", **env)
    _, named, _ = call("finetune.sh", "clipart", "--seed", "3", **env)
    _, whole, _ = call("run_code.sh", "finetune-clipart", "--seed", "3", **env)
    assert short == named == whole and "elsewhere" in whole


def test_without_a_recipe_it_is_the_digits_in_one_process(call):
    assert call("run_code.sh")[1] == call("run_code.sh", "digits")[1]
    status, words, _ = call("run_code.sh", "--epochs", "1")
    assert status == 0 and Path(words[0]).name == "python"
    args = options.parse(words[2:])
    assert (args.data_set, args.epochs, args.accum_steps) == ("DIGITS", 1, 1)


def test_the_help_and_the_error_name_every_recipe(call):
    status, words, _ = call("run_code.sh", "--help")
    assert status == 0 and {"DATA=FOLDER", "OUT=FOLDER", "CKPT=FILE", "NGPU=N", *ALL} <= set(words)
    error = call("run_code.sh", "mnist")[2]
    assert set(re.findall(r"[\w-]+", error.partition("they are")[2])) - {"and"} == ALL


@pytest.mark.parametrize(("found", "processes"), [("0", 1), ("2", 2), ("8", 2)])
def test_without_ngpu_all_devices_train_up_to_the_recipes(call, tmp_path, found, processes):
    _, words, _ = call("run_code.sh", "imagenet", DATA=str(tmp_path), FOUND=found)
    accum = int(words[words.index("--accum-steps") + 1])
    assert processes * accum == 2 and (f"--nproc_per_node={processes}" in words) == (processes > 1)


BAD = {
    "recipe": ("run_code.sh mnist", {}, "no recipe mnist", "cifar100"),
    "recipe to tune": ("finetune.sh mnist", {}, "no recipe finetune-mnist", "finetune-clipart"),
    "no data": ("run_code.sh imagenet", {}, "imagenet needs its data", "DATA=FOLDER"),
    "missing data": ("run_code.sh imagenet", {"DATA": "/nowhere"}, "DATA=/nowhere", "no such folder"),
    "no checkpoint": ("finetune.sh", {"DATA": "/"}, "the checkpoint to start from", "CKPT=FILE"),
    "missing checkpoint": ("finetune.sh", {"DATA": "/", "CKPT": "/no.pth"}, "CKPT=/no.pth", "no such file"),
    "processes": ("run_code.sh imagenet", {"DATA": "/", "NGPU": "3"}, "NGPU=3", "a number that does"),
    "no number": ("run_code.sh imagenet", {"DATA": "/", "NGPU": "all"}, "NGPU=all", "at least 1"),
}


@pytest.mark.parametrize("row", BAD)
def test_the_scripts_say_in_one_line_what_is_missing(call, row):
    command, env, value, remedy = BAD[row]
    status, words, error = call(*command.split(), **env)
    assert status == 2 and words == [] and len(error.splitlines()) == 1
    assert error.startswith("run_code.sh: error: ") and value in error and remedy in error


SITE = """
import torchvision.datasets.cifar as cifar
cifar.check_integrity = lambda *_, **__: True  # the small files have other checksums
"""


@pytest.fixture(scope="module")
def small_data(tree, tmp_path_factory) -> Path:
    """Return a folder with a small set of each recipe's real layout, and weights of 1,000 classes."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "sitecustomize.py").write_text(SITE)
    cifar = folder / "cifar100" / "cifar-100-python"
    cifar.mkdir(parents=True)
    batch = {"data": np.zeros((16, 3072), np.uint8), "fine_labels": list(range(16))}
    meta = {"fine_label_names": [str(i) for i in range(100)]}
    for name, content in (("train", batch), ("test", batch), ("meta", meta)):
        (cifar / name).write_bytes(pickle.dumps(content))
    for name in ("clipart", "imagenet", "evit"):
        shutil.copytree(tree(count=8, side=48), folder / name)
    for name, file in (("dhvt_small_imagenet_patch16", "small.pth"), ("deit_small_patch16_224", "deit.pth")):
        torch.save({"model": timm.create_model(name, depth=1).state_dict()}, folder / file)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["cifar100", "clipart", "finetune-clipart", "evit", "finetune-evit"])
def test_published_recipes_train_an_epoch_in_two_processes(recipe, small_data, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env |= {"DATA": str(small_data / recipe.removeprefix("finetune-")), "OUT": str(tmp_path / "out"), "NGPU": "2"}
    env |= {"CKPT": str(small_data / ("deit.pth" if "evit" in recipe else "small.pth")), "PYTHONPATH": str(small_data)}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "lo"}
    short = "--epochs 1 --batch-size 4 --model-kwargs depth=1 --device cpu --num_workers 0 --print-freq 1"
    short += " --drop_loc 0 --shrink_start_epoch 0" if "evit" in recipe else ""
    command = ["bash", str(ROOT / "run_code.sh"), recipe, *short.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    accumulated = 4 if "evit" in recipe else 1
    assert f"effective batch size {8 * accumulated} = 4 per process x 2 processes x {accumulated}" in done.stdout
    saved = torch.load(tmp_path / "out" / "checkpoint.pth")
    classes = 100 if recipe == "cifar100" else 2
    assert saved["epoch"] == 0 and len(saved["classes"]) == len(saved["model"]["head.weight"]) == classes
    if recipe.startswith("finetune"):
        assert re.search(r"Fine-tuning from \S+: \d+ matched", done.stdout) and "in train mode" in done.stdout
