"""The scripts: what each recipe asks of main.py, and each published one run for a shortened epoch."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from models.build import build_model
from util import options

ROOT = Path(__file__).parent.parent
PAPER = (ROOT / "docs" / "paper.md").read_text()
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
OTHERS = {"deit-cifar100", "cifar100-224", "clipart-100", "painting-100", "sketch-100", "ablation", "digits-ablation"}
OTHERS |= {
    "small",
    "fashion",
    "finetune-painting",
    "finetune-sketch",
    "finetune-cifar100",
    "digits",
    "digits-evit",
    "finetune-digits-evit",
}
ALL = {*PUBLISHED, *OTHERS}

# recipe and variables: model and its arguments, data set, pixels, effective batch size, rate after scaling, epochs,
# epochs of warm-up, and the folder below output/
C4, C2, D4 = "dhvt_{}_cifar_patch4", "dhvt_{}_cifar_patch2", "deit_{}_patch16_224"
DOMAIN, IMAGENET = "dhvt_{}_domain_patch16", "dhvt_{}_imagenet_patch16"
VARIANTS = {
    "cifar100 SIZE=small": (C4, {}, "CIFAR", 32, 512, 1e-3, 300, 5, "cifar100-small"),
    "cifar100 PATCH=2": (C2, {}, "CIFAR", 32, 512, 1e-3, 300, 5, "cifar100-patch2"),
    "cifar100 PAPER=1": (C4, {}, "CIFAR", 32, 512, 1e-3, 300, 5, "cifar100-paper"),
    "cifar100 SIZE=small PATCH=2 PAPER=1": (C2, {}, "CIFAR", 32, 256, 1e-3, 300, 5, "cifar100-small-patch2-paper"),
    "deit-cifar100": (D4, {"patch_size": 4, "num_heads": 4}, "CIFAR", 32, 512, 1e-3, 300, 5, "deit-cifar100"),
    "deit-cifar100 SIZE=small": (D4, {"patch_size": 4}, "CIFAR", 32, 512, 1e-3, 300, 5, "deit-cifar100-small"),
    "real SIZE=small": (DOMAIN, {}, "real", 224, 256, 5e-4, 300, 20, "real-small"),
    "real PAPER=1": (DOMAIN, {}, "real", 224, 256, 1e-3, 300, 20, "real-paper"),
    "real SIZE=small PAPER=1": (DOMAIN, {}, "real", 224, 128, 1e-3, 300, 20, "real-small-paper"),
    "imagenet SIZE=small": (IMAGENET, {}, "IMNET", 224, 256, 2.5e-4, 300, 10, "imagenet-small"),
    "imagenet PAPER=1": (IMAGENET, {}, "IMNET", 224, 512, 5e-4, 300, 10, "imagenet-paper"),
    "folder SIZE=small": (IMAGENET, {}, "FOLDER", None, 256, 5e-4, 300, 20, "folder-small"),
    "cifar100-224": (DOMAIN, {}, "CIFAR", 224, 256, 5e-4, 100, 20, "cifar100-224"),
    "sketch-100 SIZE=small": (DOMAIN, {}, "sketch", 224, 256, 5e-4, 100, 20, "sketch-100-small"),
    "finetune-cifar100 SIZE=small": (IMAGENET, {}, "CIFAR", 224, 256, 2.5e-4, 100, 2, "finetune-cifar100-small"),
    "finetune-sketch PAPER=1 SIZE=tiny": (IMAGENET, {}, "sketch", 224, 256, 5e-4, 100, 2, "finetune-sketch-tiny-paper"),
}

# recipes of the digits: model and its arguments, pixels, rate, epochs, epochs of warm-up; keep rate, fused, start and
# length of the shrinking, None for a model that keeps all tokens
EVIT = ("deit_tiny_patch16_shrink_base", {"patch_size": 4, "embed_dim": 64, "num_heads": 2, "depth": 6}, [28])
SMALL = ("dhvt_tiny_cifar_patch4", {"embed_dim": 64, "depth": 6}, None)
ON_DIGITS = {
    "digits": (("dhvt_tiny_cifar_patch4", {}, None), 1e-3, 9, 1, None),
    "digits-ablation table6-dhvt": (SMALL, 2e-3, 10, 1, None),
    "digits-evit": (EVIT, 2e-3, 40, 3, (1, False, 10, 0)),
    "finetune-digits-evit": (EVIT, 1e-3, 15, 0, (0.7, True, 0, 5)),
}

# models of the recipe fashion, and by images per class: share of the training images, and epochs (docs/small_data.md)
FASHION_MODELS = {
    "dhvt": ("dhvt_tiny_cifar_patch4", {}),
    "deit": ("deit_tiny_patch16_224", {"patch_size": 4, "num_heads": 4}),
    "resnet": ("resnet18_cifar", {}),
    "cct": ("cct_7_3x1_32", {}),
}
FASHION_SHARES = {"60": (0.01, 20), "300": (0.05, 10)}

# the rows of Tables 5, 6, 8, 9, 10 and 11 and of B.2.2: the model's arguments; patch size 4
BASELINE = {"sope": False, "daff": False, "head_tokens": False, "pos_embed": "learn"}
ROWS = {
    "table5-ape": BASELINE,
    "table5-ape-sope": {"daff": False, "head_tokens": False, "pos_embed": "learn"},
    "table5-ape-daff": {"sope": False, "head_tokens": False, "pos_embed": "learn"},
    "table5-ape-sope-daff": {"head_tokens": False, "pos_embed": "learn"},
    "table5-none": {"sope": False, "daff": False, "head_tokens": False},
    "table5-sope": {"daff": False, "head_tokens": False},
    "table5-daff": {"sope": False, "head_tokens": False},
    "table5-sope-daff": {"head_tokens": False},
    "table6-baseline": BASELINE,
    "table6-head-tokens": {"sope": False, "daff": False, "pos_embed": "learn"},
    "table6-dhvt": {},
    "table8-mlp": BASELINE,
    "table8-split": BASELINE | {"ffn": "split"},
    "table8-split-aggregate": BASELINE | {"ffn": "split_aggregate"},
    "table8-split-avgpool": BASELINE | {"ffn": "split_avgpool"},
    "table9-dhvt": {},
    "table9-all-tokens": {"aggregate": "all"},
    "table9-no-shortcut": {"shortcut": False},
    "b22-dhvt-no-affine": {"affine": False},
    "b22-vit-sope-no-affine": {"daff": False, "head_tokens": False, "pos_embed": "learn", "affine": False},
    "table10-deit-tiny-3": BASELINE | {"num_heads": 3},
    "table10-deit-tiny-4": BASELINE | {"num_heads": 4},
    "table10-tiny-3": {"num_heads": 3},
    "table10-tiny-4": {"num_heads": 4},
    "table10-small-4": {"num_heads": 4},
    "table10-small-6": {"num_heads": 6},
    "table10-small-8": {"num_heads": 8},
    **{
        f"table11-{sope}-{daff}-{batch}": {"sope_norm": sope, "daff_norm": daff}
        for sope in ("bn", "ln")
        for daff in ("bn", "ln")
        for batch in (128, 256, 512)
    },
}
# images of an epoch, and training images/s on an H200 (BENCHMARKS.md)
IMAGES = {"CIFAR": 50_000, "clipart": 33_525, "infograph": 36_023, "painting": 50_416, "quickdraw": 120_750}
IMAGES |= {"real": 120_906, "sketch": 48_212, "IMNET": 1_281_167}
RATES = {"tiny": 4_040, "small": 2_446}
VARIABLES = ("DATA", "OUT", "CKPT", "NGPU", "SIZE", "PATCH", "PAPER", "SEEDS")


STAND_IN = """#!/bin/sh
[ "$1" = -c ] && { echo "${FOUND:-0}"; exit; }
echo "$0" "$@"
case " $* " in *" --seed ${FAIL:-none} "*) exit 3 ;; esac
"""


@pytest.fixture
def call(tmp_path):
    """Return a function that runs a script, with stand-ins for python and torchrun; it returns status, words, error."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)

    def run(script: str, *words: str, **env: str) -> tuple[int, list[str], str]:
        clean = {k: v for k, v in os.environ.items() if k not in VARIABLES}
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


def parse_command(call, command: str, tmp_path: Path, **env: str):
    """Return what a command line asks of main.py in one process."""
    variables = [word for word in command.split() if re.match("[A-Z]+=", word)]
    words = [word for word in command.split() if word not in ("bash", *variables)]
    env |= dict(word.split("=") for word in variables)
    (tmp_path / "c.pth").touch()
    env = {"DATA": str(tmp_path), "CKPT": str(tmp_path / "c.pth"), "NGPU": "1"} | env
    status, launched, error = call(*words, **env)
    assert status == 0, error
    return options.parse(launched[2:])


@pytest.mark.parametrize("command", VARIANTS)
def test_variables_choose_a_variant(call, tmp_path, command):
    args = parse_command(call, f"run_code.sh {command}", tmp_path)
    model, kwargs, data_set, pixels, batch, lr, epochs, warmup, folder = VARIANTS[command]
    size = "small" if "SIZE=small" in command else "tiny"
    assert (args.model, args.model_kwargs, args.data_set) == (model.format(size), kwargs, data_set)
    assert (args.input_size, args.batch_size * args.accum_steps) == (pixels and [pixels], batch)
    assert options.scale_lr(args, 1)[0] == pytest.approx(lr)
    assert (args.epochs, args.warmup_epochs, args.output_dir) == (epochs, warmup, f"output/{folder}")
    tuned = command.startswith("finetune")
    assert (args.weight_decay, args.min_lr, args.repeated_aug) == ((1e-8, 1e-6, False) if tuned else (0.05, 1e-5, True))


@pytest.mark.parametrize("command", ON_DIGITS)
def test_a_recipe_of_the_digits_asks_for_its_run(call, tmp_path, command):
    args = parse_command(call, f"run_code.sh {command}", tmp_path)
    model, lr, epochs, warmup, shrinking = ON_DIGITS[command]
    assert (args.model, args.model_kwargs, args.input_size) == model
    assert (args.data_set, args.opt, args.weight_decay, args.min_lr) == ("DIGITS", "adamw", 0.05, 1e-5)
    assert (args.batch_size, args.accum_steps, args.lr, args.unscale_lr) == (32, 1, lr, True)
    assert (args.epochs, args.warmup_epochs, args.warmup_lr) == (epochs, warmup, 3e-4 if command == "digits" else 1e-6)
    # images are not augmented
    assert (args.repeated_aug, args.mixup, args.cutmix, args.aa) == (False, 0, 0, "none")
    assert (args.reprob, args.drop_path, args.model_ema_decay) == (0, 0, 0.98)
    assert args.output_dir == f"output/{command.replace(' ', '/')}"
    assert args.finetune == (str(tmp_path / "c.pth") if command.startswith("finetune") else "")
    if shrinking:
        assert args.drop_loc == (2, 4)
        assert (args.base_keep_rate, args.fuse_token, args.shrink_start_epoch, args.shrink_epochs) == shrinking


@pytest.mark.parametrize("side", [28, 48, 49, 112, 113, 500])
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_small_folders_are_trained_at_a_size_that_fits_their_images(call, tmp_path, side, size):
    """The stand-in finds `side`."""
    args = parse_command(call, f"run_code.sh small SIZE={size}", tmp_path, FOUND=str(side))
    kind, pixels = ("imagenet_patch16", 224) if side > 112 else ("cifar_patch4", 64 if side > 48 else 32)
    assert (args.model, args.input_size) == (f"dhvt_{size}_{kind}", [pixels])
    assert (args.data_set, args.crop, args.model_ema_warmup) == ("FOLDER", "pad", True)
    assert (args.batch_size, args.accum_steps, args.repeated_aug, args.unscale_lr) == (64, 1, False, True)
    assert (args.epochs, args.warmup_epochs, args.output_dir) == (100, 5, f"output/small-{size}")
    defaults = options.parse(["--data-set", "DIGITS"])
    for name in ("aa", "reprob", "mixup", "cutmix", "smoothing", "drop_path", "model_ema", "sched", "weight_decay"):
        assert getattr(args, name) == getattr(defaults, name), name


def test_the_size_of_small_folders_is_that_of_the_median_image(call, tmp_path):
    """Python itself looks at the images."""
    (tmp_path / "python").write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\necho "$0" "$@"\n')
    folder = tmp_path / "my data"
    (folder / "train" / "ant").mkdir(parents=True)
    env = {"DATA": str(folder), "NGPU": "1"}
    status, _, error = call("run_code.sh", "small", **env)
    assert status == 2 and error.count("\n") == 1 and f"DATA={folder}" in error and "train/CLASS/" in error
    for i, side in enumerate((20, 64, 300)):
        Image.new("P", (side, side + 100 * i)).save(folder / "train" / "ant" / f"{i}.png", transparency=b"\x80")
    (folder / "train" / "ant" / "notes.txt").touch()
    # main.py names what cannot be read, and follows links
    (folder / "train" / "ant" / "damaged.png").touch()
    (folder / "train").rename(tmp_path / "elsewhere")
    (folder / "train").symlink_to(tmp_path / "elsewhere")
    status, words, _ = call("run_code.sh", "small", **env)
    assert status == 0 and words[words.index("--input-size") + 1] == "64"


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_ablations_asks_for_its_model(call, tmp_path, row):
    args = parse_command(call, f"run_code.sh ablation {row}", tmp_path)
    size, batch = ("small", 256) if "small" in row else ("tiny", 512)
    batch = int(row.rpartition("-")[2]) if "table11" in row else batch
    assert (args.model, args.model_kwargs) == (f"dhvt_{size}_cifar_patch4", ROWS[row])
    assert (args.data_set, args.batch_size * args.accum_steps, args.lr) == ("CIFAR", batch, 1e-3)
    assert (args.epochs, args.warmup_epochs, args.unscale_lr) == (300, 10, False)
    assert args.output_dir == f"output/ablation/{row}"
    # the same model in small, on the digits
    small = parse_command(call, f"run_code.sh digits-ablation {row} --model-kwargs depth=1", tmp_path, OUT="here")
    assert (small.data_set, small.output_dir) == ("DIGITS", "here")
    assert small.model_kwargs == ROWS[row] | {"embed_dim": 64, "depth": 1}


@pytest.mark.skipif(not find_spec("models.ablations"), reason="the models' arguments are not there yet")
@pytest.mark.parametrize("row", ROWS)
def test_the_model_of_a_row_can_be_built(call, tmp_path, row):
    args = parse_command(call, f"run_code.sh ablation {row} --model-kwargs depth=1", tmp_path)
    assert len(build_model(options.model_config(args)).blocks) == 1


def test_digits_ablation_runs_ten_models_with_three_seeds_and_compares_them(call, tmp_path):
    status, words, error = call("run_code.sh", "digits-ablation", "--epochs", "2", OUT=str(tmp_path / "out"))
    assert status == 0, error
    launches = " ".join(words).split(str(tmp_path / "python"))[1:]
    runs = [options.parse(launch.split()[1:]) for launch in launches[:-1]]
    ten = [*list(ROWS)[:8], "table6-head-tokens", "table6-dhvt"]
    assert [run.output_dir for run in runs] == [f"{tmp_path}/out/{row}/seed{seed}" for row in ten for seed in range(3)]
    assert [run.seed for run in runs] == [0, 1, 2] * 10 and {run.epochs for run in runs} == {2}
    script, *folders = launches[-1].split()
    assert script.endswith("compare.py")
    assert folders == [*(f"{tmp_path}/out/{row}" for row in ten), "--out", f"{tmp_path}/out"]


# writes down its command; a run gets its learning rate's accuracy on the hold-out, an evaluation its report
FASHION_STAND_IN = """#!/bin/bash
[[ $1 != - ]] || exec {python} "$@"
echo "$@" >> {log}
words=" $* "
if [[ $words == *" --report "* ]]; then
    mkdir -p "${{@: -1}}" && echo '{{}}' > "${{@: -1}}/report.json"
elif [[ $words =~ " --lr "([^ ]+)" --output_dir "([^ ]+) ]]; then
    mkdir -p "${{BASH_REMATCH[2]}}"
    declare -A best=([5e-4]=30 [1e-3]=50 [2e-3]=40)
    echo '{{"test_acc1": '${{best[${{BASH_REMATCH[1]}}]}}'}}' > "${{BASH_REMATCH[2]}}/log.txt"
    echo '{{"test_acc1": 10}}' >> "${{BASH_REMATCH[2]}}/log.txt"
fi
"""


def test_fashion_chooses_the_rate_on_the_hold_out_and_tests_each_seed_once(tmp_path):
    (tmp_path / "python").write_text(FASHION_STAND_IN.format(python=sys.executable, log=tmp_path / "log"))
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": str(tmp_path), "OUT": str(tmp_path / "out")}
    command = ["bash", str(ROOT / "run_code.sh"), "fashion", "300-deit", "--amp", "off"]
    subprocess.run(command, env=env, check=True, timeout=60)
    runs = [options.parse(line.split()[1:]) for line in (tmp_path / "log").read_text().splitlines()]
    trained, tested = runs[:5], runs[5:]
    assert [(run.lr, run.seed) for run in trained] == [(5e-4, 0), (1e-3, 0), (2e-3, 0), (1e-3, 1), (1e-3, 2)]
    for run in trained:
        assert (run.model, run.model_kwargs["num_heads"], run.amp) == ("deit_tiny_patch16_224", 4, "off")
        assert (run.data_set, run.train_fraction, run.val_fraction) == ("FASHION", 0.05, 0.1)
        assert (run.opt, run.weight_decay, run.batch_size, run.epochs, run.warmup_epochs) == ("adamw", 0.05, 32, 10, 2)
        assert (run.unscale_lr, run.repeated_aug, run.crop, run.model_ema_warmup) == (True, False, "pad", True)
    seeds = [f"{tmp_path}/out/seeds/{seed}" for seed in (0, 1, 2)]
    assert [run.output_dir for run in trained[3:]] == seeds[1:]
    assert [(run.eval, run.split, run.report) for run in tested] == [(True, "test", f"{seed}/test") for seed in seeds]
    assert [run.resume for run in tested] == [f"{seed}/best_checkpoint.pth" for seed in seeds]
    # what is tested is not tested again
    subprocess.run(command, env=env, check=True, timeout=60)
    assert (tmp_path / "log").read_text().count("--eval") == 3


def test_fashion_compares_all_its_rows(tmp_path):
    (tmp_path / "python").write_text(FASHION_STAND_IN.format(python=sys.executable, log=tmp_path / "log"))
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": str(tmp_path), "OUT": str(tmp_path / "out")}
    subprocess.run(["bash", str(ROOT / "run_code.sh"), "fashion"], env=env, check=True, timeout=60)
    *runs, compared = (tmp_path / "log").read_text().splitlines()
    assert len(runs) == 8 * 8
    for run in (options.parse(line.split()[1:]) for line in runs if "--lr" in line):
        images, model = Path(run.output_dir).relative_to(tmp_path / "out").parts[0].split("-")
        assert (run.model, run.model_kwargs) == FASHION_MODELS[model]
        assert (run.train_fraction, run.epochs) == FASHION_SHARES[images]
    script, *words = compared.split()
    rows = [f"{n}-{model}" for n in (300, 60) for model in ("cct", "deit", "dhvt", "resnet")]
    assert script.endswith("compare.py") and words[:8] == [f"{tmp_path}/out/{row}/seeds" for row in rows]
    assert words[8:] == ["--x", "train_fraction", "--out", f"{tmp_path}/out"]


def test_seeds_are_runs_one_after_the_other_until_one_fails(call, tmp_path):
    env = {"SEEDS": "3 5 7", "DATA": str(tmp_path), "NGPU": "1"}
    for fail, seeds, expected in (("none", [3, 5, 7], 0), ("5", [3, 5], 3)):
        status, words, _ = call("run_code.sh", "imagenet", "--seed", "1", **env, FAIL=fail)
        runs = [options.parse(run.split()[1:]) for run in " ".join(words).split(str(tmp_path / "python"))[1:]]
        assert status == expected and [run.seed for run in runs] == seeds
        assert [run.output_dir for run in runs] == [f"output/imagenet/seed{seed}" for seed in seeds]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_run_and_ends_the_seeds_with_its_status(tmp_path, number):
    """The run's stand-in saves for a while, and ends with the status of a stopped run."""
    code = "trap 'sleep 0.3; echo saved; exit 75' TERM; echo started; for i in {1..200}; do sleep 0.05; done"
    (tmp_path / "python").write_text(f"#!/bin/bash\n{code}\n")
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEDS": "0 1", "OUT": "out"}
    script = subprocess.Popen(["bash", str(ROOT / "run_code.sh")], env=env, stdout=subprocess.PIPE, text=True)
    assert script.stdout.readline() == "started\n"
    script.send_signal(number)
    assert script.communicate(timeout=20)[0] == "saved\n"
    assert script.returncode == 75


def test_the_commands_of_docs_paper_cost_what_it_says(call, tmp_path):
    lines = re.findall(r"^\|.*?`([^`]*(?:run_code|finetune)\.sh[^`]*)` \| ([\d.,]+) (h|updates) \|", PAPER, re.M)
    assert {command.split()[-1] for command, *_ in lines if "ablation" in command} == set(ROWS)
    assert len(lines) == len(ROWS) + 8 + 12 + 2 + 8 + 8
    for command, cost, unit in lines:
        args = parse_command(call, command, tmp_path)
        if unit == "h":
            rate = RATES["small" if "small" in args.model else "tiny"]
            found = args.epochs * IMAGES[args.data_set] / rate / 3600
            assert found == pytest.approx(float(cost), rel=2e-3, abs=0.0051), command
        else:
            updates = IMAGES[args.data_set] // (args.batch_size * args.accum_steps)
            assert args.epochs * updates == int(cost.replace(",", "")), command


def test_macs_without_attentions_products_are_the_papers():
    rows = re.findall(r"^\| `(dhvt_\w+)` \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAPER, re.M)
    assert len(rows) == 8
    for name, tokens, ours, without, published in rows:
        model = timm.create_model(name, depth=1)
        attention = model.blocks[0].attn
        assert int(tokens) == 1 + model.patch_embed.num_patches + attention.num_heads
        products = 12 * 2 * int(tokens) ** 2 * model.embed_dim / 1e9
        assert float(without) == pytest.approx(float(ours) - products, abs=6e-4)
        assert f"{float(without):.1f}" == published


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
    assert status == 0 and {"DATA=FOLDER", "OUT=FOLDER", "CKPT=FILE", "NGPU=N", *ALL, *ROWS} <= set(words)
    assert {"SIZE=NAME", "PATCH=N", "PAPER=1", "SEEDS="} <= {word.partition('"')[0] for word in words}
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
    "row": ("run_code.sh ablation table7", {"DATA": "/"}, "ablation table7", "table9-no-shortcut"),
    "no row": ("run_code.sh ablation", {"DATA": "/"}, "ablation without a row", "table11-ln-ln-512"),
    "size": ("run_code.sh imagenet", {"DATA": "/", "SIZE": "base"}, "SIZE=base", "tiny or small"),
    "patch": ("run_code.sh cifar100", {"DATA": "/", "PATCH": "8"}, "PATCH=8", "4 or 2"),
    "paper": ("run_code.sh cifar100", {"DATA": "/", "PAPER": "no"}, "PAPER=no", "give 1"),
    "no size": ("run_code.sh evit", {"DATA": "/", "SIZE": "small"}, "evit has no SIZE", "leave it out"),
    "no patch": ("run_code.sh clipart", {"DATA": "/", "PATCH": "2"}, "clipart has no PATCH", "leave it out"),
    "patch of small": ("run_code.sh small", {"DATA": "/", "PATCH": "2"}, "small has no PATCH", "leave it out"),
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
    for name in ("clipart", "imagenet", "evit", "painting"):
        shutil.copytree(tree(count=8, side=48), folder / name)
    for name, file in (("dhvt_small_imagenet_patch16", "small.pth"), ("deit_small_patch16_224", "deit.pth")):
        torch.save({"model": timm.create_model(name, depth=1).state_dict()}, folder / file)
    return folder


EPOCHS = ["cifar100", "clipart", "finetune-clipart", "evit", "finetune-evit", "imagenet", "cifar100-224"]
EPOCHS += ["finetune-cifar100", "deit-cifar100", "painting-100", "ablation table6-dhvt"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", EPOCHS)
def test_published_recipes_train_an_epoch_in_two_processes(recipe, small_data, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    data = re.search("cifar100|clipart|painting|imagenet|evit|ablation", recipe)[0].replace("ablation", "cifar100")
    env |= {"DATA": str(small_data / data), "OUT": str(tmp_path / "out"), "NGPU": "2"}
    env |= {"CKPT": str(small_data / ("deit.pth" if "evit" in recipe else "small.pth")), "PYTHONPATH": str(small_data)}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "lo"}
    short = "--epochs 1 --batch-size 4 --model-kwargs depth=1 --device cpu --num_workers 0 --print-freq 1"
    short += " --drop_loc 0 --shrink_start_epoch 0" if "evit" in recipe else ""
    command = ["bash", str(ROOT / "run_code.sh"), *recipe.split(), *short.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    accumulated = 4 if "evit" in recipe else 1
    assert f"effective batch size {8 * accumulated} = 4 per process x 2 processes x {accumulated}" in done.stdout
    saved = torch.load(tmp_path / "out" / "checkpoint.pth")
    classes = 100 if data == "cifar100" else 2
    assert saved["epoch"] == 0 and len(saved["classes"]) == len(saved["model"]["head.weight"]) == classes
    if recipe.startswith("finetune"):
        assert re.search(r"Fine-tuning from \S+: \d+ matched", done.stdout) and "in train mode" in done.stdout
