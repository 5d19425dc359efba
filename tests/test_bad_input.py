"""What a person can get wrong: one line names it and says what to do, and nothing is written."""

import contextlib
import json
import os
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import main
from models import build
from util import options
from util.config import ModelConfig
from util.errors import InputError

EVIT = "--model deit_tiny_patch16_shrink_base --model-kwargs patch_size=8 embed_dim=32 num_heads=2 --input-size 32"
TEACH = (
    "--distillation-type hard --teacher-model test_resnet --teacher-path teacher.pth --input-size 32 "
    "--model deit_tiny_distilled_patch16_224 --model-kwargs patch_size=8 embed_dim=48 depth=1 num_heads=2"
)

# flags that contradict themselves or each other: what the line says
COMMAND_LINES = {
    "--data-set FOLDERS": "--data-set: FOLDERS: no such data set; did you mean FOLDER?",
    "--data-set CIFAR100": "--data-set: CIFAR100: no such data set; did you mean CIFAR?",
    "--data-set WORDS": "--data-set: WORDS: no such data set; choose from DIGITS, FOLDER",
    "--amp int8": "--amp: invalid choice: 'int8' (choose from",
    "--model-kwargs depth": "--model-kwargs takes KEY=VALUE, not 'depth'",
    "--model-kwargs img_size=64": "--model-kwargs img_size=64: use --input-size",
    "--input-size 32 32 32": "--input-size 32 32 32 must be one number, or height and width",
    "--model-kwargs pretrained=True": "--model-kwargs pretrained=True: use --pretrained",
    "--opt-kwargs amsgrad": "--opt-kwargs takes KEY=VALUE, not 'amsgrad'",
    "--torchcompile-mode reduce-overhead": "--torchcompile-mode is for --compile: add it",
    "--compile --torchcompile-mode max-autotune --accum-steps 2": "use max-autotune-no-cudagraphs, or leave",
    "--import nowhere.py": "--import nowhere.py: FileNotFoundError: ",
    "--config nowhere.yaml": "--config nowhere.yaml: unreadable (",
    "--eval": "--eval needs a checkpoint: add --resume FILE, or --pretrained",
    "--opt-betas 0.9": "--opt-betas 0.9: --opt adamw takes 2",
    "--cutmix-minmax 0.5": "--cutmix-minmax 0.5: give a minimum and a larger maximum",
    "--mean 0.5 0.5": "--mean: expected 3 arguments",
    "--mean 125 123 114": "--mean: 125 must be from 0 to 1",
    "--std 0 0 0": "--std: 0 must be above 0",
    "--scale 0.9 0.5": "--scale 0.9 0.5: give the minimum first",
    "--scale 0.5 1.5": "--scale: 1.5 must be above 0 and at most 1",
    "--ratio 1.3 0.8": "--ratio 1.3 0.8: give the minimum first",
    "--hflip 2": "--hflip: 2 must be from 0 to 1",
    "--crop center": "--crop: invalid choice: 'center' (choose from",
    "--ThreeAugment --src --crop rrc": "--src and --crop: give one crop",
    "--crop squash --ratio 0.9 1.1": "--crop and --ratio: give one crop; --scale and --ratio are of --crop rrc",
    "--mixup 0 --cutmix 0 --mixup-off-epoch 3": "--mixup-off-epoch 3: mixup and cutmix are off; leave it out",
    "--no-model-ema --model-ema-warmup": "--model-ema-warmup is for the EMA, which --no-model-ema leaves out",
    "--class-weights rare": "--class-weights: invalid choice: 'rare' (choose from",
    "--freeze=-1": "--freeze -1: give head, or the number of blocks",
    f"{EVIT} --drop_loc 3,x": "--drop_loc: 3,x must be numbers of blocks, for example 3,6,9",
    "--visualize_attention": "--visualize_attention needs a checkpoint: add --resume FILE",
    "--eval --visualize_attention --resume x": "--eval and --visualize_attention: give one at a time",
    "--visualize matrix --visualize_mask --resume x": "--visualize and --visualize_mask: give one at a time",
    "--visualize heads --resume x": "--visualize: invalid choice: 'heads' (choose from",
    "--npz": "--npz is for --visualize KIND",
    "--eval --resume x --image-dir y": "--image-dir is for --visualize KIND",
    "--report x": "--report is for --eval",
    "--split test": "--split is for --eval and --visualize",
    "--folds 1": "--folds: 1 must be 0 or at least 2",
    "--val-fraction 1": "--val-fraction: 1 must be at least 0 and below 1",
    "--train-fraction 0": "--train-fraction: 0 must be above 0 and at most 1",
    "--use-ema": "--use-ema is for --eval, --finetune and --visualize",
    "--resume auto": "--resume auto looks into --output_dir: give one",
    "--compile --grad-checkpointing": "--compile and --grad-checkpointing: give one",
    "--batch-size 7": "--batch-size 7 must be even",
    "--bce-loss": "add --smoothing 0",
    "--bce-loss --mixup 0 --cutmix 0 --smoothing 0.1": "add --smoothing 0",
    "--src": "--src is the crop of --ThreeAugment",
    "--lr-noise 0.5 --lr-noise-pct 0": "--lr-noise-pct: 0 must be above 0",
    "--lr-noise 0.5 --lr-noise-std nan": "--lr-noise-std: nan must be 0 or more",
    "--distillation-type soft": "--distillation-type soft needs --teacher-path FILE",
    "--kd": "--kd needs --teacher-path FILE",
    f"{TEACH} --kd": "--kd and --distillation-type hard: give one",
    "--log-wandb project": "--log-wandb writes to --output_dir: give one",
    "--save-images": "--save-images writes to --output_dir: give one",
    f"{TEACH} --no-train-mode": "--no-train-mode averages the two heads",
    "--start_epoch 5": "--start_epoch 5 must be below --epochs 1",
    "--start_epoch 1": "--start_epoch 1 must be below --epochs 1",
    "--cutmix-minmax 0.5 0.5": "--cutmix-minmax 0.5 0.5: give a minimum and a larger maximum",
    "--opt adan --opt-betas 0.9 0.9": "--opt-betas 0.9 0.9: --opt adan takes 3",
}


@pytest.mark.parametrize("flags", COMMAND_LINES)
def test_the_command_line_is_checked_before_anything_is_read(flags, tiny_flags):
    with pytest.raises(InputError) as caught:
        options.parse([*tiny_flags, *flags.split()])
    assert COMMAND_LINES[flags] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--opt adan --opt-betas 0.9 0.9 0.9",
        "--epochs 2 --start_epoch 1",
        "--scale 1 1 --ratio 1 1",
        "--mixup 0 --cutmix 0 --cutmix-minmax 0.2 0.8 --mixup-off-epoch 1",
    ],
)
def test_values_at_the_limits_are_accepted(flags, tiny_flags):
    options.parse([*tiny_flags, *flags.split()])


def test_as_many_outputs_as_classes_are_accepted_and_a_teachers_classes_are_the_students():
    assert [build.resolve_num_classes(number, "abc") for number in (None, 3, 4)] == [3, 3, 4]
    models = {number: timm.create_model("test_resnet", num_classes=number) for number in (2, 3, 4)}
    for number, model in models.items():
        teacher = build.TrainedModel(model, ModelConfig("test_resnet"), None, None, "teacher.pth")
        refused = contextlib.nullcontext() if number == 3 else pytest.raises(InputError, match=f"has {number} classes")
        with refused:
            build.check_teacher(teacher, models[3], "abc", two_heads=False)


class Row(NamedTuple):
    """A command line, what its one line of complaint names, and the remedy in it."""

    flags: str
    value: str
    remedy: str
    prepare: Callable[[], object] | None = None  # runs in the test's folder: data/ and run/ are its own to spoil
    env: dict[str, str] = {}
    out: str = "--output_dir out "


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch marker",)


def change(make: Callable[[dict], object]) -> Callable[[], None]:
    """Return a preparation that saves run/checkpoint.pth anew as `make` leaves or returns it."""

    def prepare() -> None:
        saved = torch.load("run/checkpoint.pth")
        result = make(saved)
        torch.save(saved if result is None else result, "run/checkpoint.pth")

    return prepare


def cut_head(saved: dict) -> dict:
    """Return a checkpoint's weights with three classes."""
    head = ("head.weight", "head.bias")
    return {name: tensor[:3] if name in head else tensor for name, tensor in saved["model"].items()}


def old_hostile() -> None:
    torch.save({"model": Hostile()}, "run/checkpoint.pth", _use_new_zipfile_serialization=False)


def truncate(path: Path | str) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(0.6 * len(data))])


def write_text(path: Path | str, text: str = "{}") -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(text)


def write_flags(text: str) -> Callable[[], None]:
    """Return a preparation that writes a file of flags."""
    return lambda: write_text("flags.yaml", text)


def truncate_photographs() -> None:
    for path in Path("data/train").rglob("*.jpg"):
        truncate(path)


def flatten_val() -> None:
    for path in list(Path("data/val").rglob("*.*")):
        path.rename(Path("data/val", f"{path.parent.name}_{path.name}"))
    for name in ("ant", "bee"):
        Path("data/val", name).rmdir()


def write_tiffs(kind: type) -> Callable[[], None]:
    """Return a preparation that leaves TIFFs alone, of numbers whose range Pillow does not know."""

    def prepare() -> None:
        for path in list(Path("data/train").rglob("*.*")):
            path.unlink()
            Image.fromarray(np.ones((32, 32), kind)).save(path.with_suffix(".tif"))

    return prepare


def remove_bees() -> None:
    shutil.rmtree("data/train/bee")


def only_text() -> None:
    for path in Path("data/train/bee").iterdir():
        path.rename(path.with_suffix(".txt"))


def save_teacher(num_classes: int = 10, **more: object) -> Callable[[], None]:
    """Return a preparation that saves teacher.pth, a test_resnet."""

    def prepare() -> None:
        teacher = timm.create_model("test_resnet", num_classes=num_classes)
        torch.save({"model": teacher.state_dict(), **more}, "teacher.pth")

    return prepare


def write_inat(annotated: int) -> Callable[[], None]:
    """Return a preparation that writes iNaturalist's lists for two categories, without the images."""

    def prepare() -> None:
        images = [{"file_name": f"train/group/{k}/{k}.jpg"} for k in (0, 1)]
        train = {"images": images, "annotations": [{"category_id": k} for k in range(annotated)]}
        Path("data/train2018.json").write_text(json.dumps(train))
        Path("data/categories.json").write_text(json.dumps([{"name": "Rosa canina"}, {"name": "Parus major"}]))

    return prepare


def write_food() -> None:
    """Write Food-101's lists, without the images."""
    Path("data/food-101/images").mkdir(parents=True)
    Path("data/food-101/meta").mkdir()
    for split in ("train", "test"):
        Path(f"data/food-101/meta/{split}.json").write_text(json.dumps({"pie": ["pie/1", "pie/2"]}))


def write_pet_folders() -> None:
    for name in ("images", "annotations"):
        Path("data/oxford-iiit-pet", name).mkdir(parents=True)


def copy_published() -> None:
    shutil.copy(Path(__file__).parent / "golden" / "legacy_digits.lmdb", "data/train.lmdb")


def refuse(*args: object, **kwargs: object) -> None:
    raise URLError("no network")


FOLDER = "--data-set FOLDER --data-path data --batch-size 4"
NAMED = "--data-path data --batch-size 2 --data-set"
INAT = "--data-set INAT --data-path data --batch-size 2"
TWO = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
RESUME = "--resume run/checkpoint.pth --epochs 2"
EVAL = "--eval --resume run/checkpoint.pth"
ATTENTION = "--visualize_attention --resume run/checkpoint.pth"
ACCELERATOR = (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type

ROWS = {
    # device and processes
    "no such device": Row("--device gpu", "--device gpu", "cuda"),
    "another device": Row("--device xpu", "--device xpu", f"this machine has {ACCELERATOR}"),
    "no such backend": Row("--dist-backend pigeons", "--dist-backend pigeons", "", env=TWO),
    "no rendezvous": Row("", "MASTER_ADDR", "torchrun", env={"WORLD_SIZE": "2"}),
    # the model
    "model": Row("--model dhvt_tiny_cifar_patch", "--model dhvt_tiny_cifar_patch:", "dhvt_tiny_cifar_patch4"),
    "tag": Row("--model resnet18.best --model-kwargs", "resnet18.best", "leave out what follows the dot"),
    "model argument": Row("--model-kwargs dept=1", "dept", "--model-kwargs"),
    "ablation without its part": Row("--model-kwargs daff=false shortcut=false", "shortcut=False", "daff=True"),
    "no such ablation": Row("--model-kwargs aggregate=patches", "aggregate=patches", "cls or all or none"),
    "size below a patch": Row("--model vit_tiny_patch16_224 --input-size 8 --model-kwargs", "8x8", "larger"),
    "no whole patches": Row(f"{EVIT} --input-size 30 --drop_loc 0", "30x30", "8x8"),
    "no checkpointing": Row(
        "--model pit_ti_224 --model-kwargs --input-size 64 --grad-checkpointing", "pit", "--grad-checkpointing"
    ),
    "optimizer": Row("--opt adamx", "--opt adamx", "list_optimizers"),
    "optimizer's argument": Row("--opt-kwargs amsgrade=true", "'amsgrade'", "--opt-kwargs"),
    "optimizer's argument with a flag": Row("--opt-kwargs eps=1", "'eps'", "change --opt-kwargs"),
    "optimizer's argument out of range": Row("--opt adamp --opt-kwargs fused=3", "'fused'", "change --opt-kwargs"),
    "optimizer of second order": Row("--opt adahessian", "--opt adahessian", "choose another"),
    "schedule longer than the run": Row("--sched wsd", "--sched wsd", "--decay-epochs"),
    "no weights of DHVT": Row("--pretrained", "dhvt_tiny_cifar_patch4", "train it, or give --finetune FILE"),
    "two kinds of weights": Row("--pretrained --finetune x", "--pretrained and --finetune", "give one"),
    "not Python": Row(
        "--import own.py", "own.py: SyntaxError", "correct the file", lambda: write_text("own.py", "def")
    ),
    # a file of flags
    "unknown key": Row("-c flags.yaml", "flags.yaml: --batchsize", "--batch-size?", write_flags("batchsize: 8")),
    "key without a value": Row("-c flags.yaml", "flags.yaml: --wdecay", "--help", write_flags("wdecay:")),
    "broken": Row("-c flags.yaml", "line 1, column 6", "YAML or JSON", write_flags("lr: a: b")),
    "no pairs": Row("-c flags.yaml", "flags.yaml: must hold", "FLAG: VALUE", write_flags("- lr")),
    "out of range": Row("-c flags.yaml", "flags.yaml: --epochs: 0", "at least 1", write_flags("epochs: 0")),
    "no boolean": Row("-c flags.yaml", "--compile: 'no'", "true or false", write_flags("compile: 'no'")),
    "one number of two": Row("-c flags.yaml", "flags.yaml: --scale", "expected 2", write_flags("scale: 0.5")),
    "no choice": Row("-c flags.yaml", "flags.yaml: --crop", "choose from", write_flags("crop: center")),
    "file of a file": Row("-c flags.yaml", "flags.yaml: --config", "cannot name another", write_flags("config: x")),
    "policy": Row("--aa rand-x9", "--aa rand-x9", "rand-m9-mstd0.5-inc1"),
    # pictures
    "no such images": Row(f"{ATTENTION} --image-dir nowhere", "nowhere: no such file", ".jpg", out=""),
    "no such block": Row(f"{ATTENTION} --blocks 1 2", "--blocks 2", "of blocks 1"),
    "no images to show": Row(f"{ATTENTION} --image-dir data/train/bee", "data/train/bee", ".jpg", only_text),
    # the output folder
    "out is a file": Row("--output_dir data/note", "data/note", "name a folder", lambda: write_text("data/note")),
    "out below a file": Row("--output_dir data/note/out", "data/note", "", lambda: write_text("data/note")),
    "out holds a run": Row("--output_dir run", "--output_dir run", "--resume auto"),
    "nothing to evaluate": Row("--eval --resume auto", "checkpoint in out", "name another folder"),
    "report is a file": Row(f"{EVAL} --report data/note", "data/note", "another", lambda: write_text("data/note")),
    "report below a file": Row(f"{EVAL} --report data/note/x", "data/note", "another", lambda: write_text("data/note")),
    # class folders
    "no data path": Row("--data-set FOLDER", "--data-set FOLDER", "--data-path FOLDER"),
    "no data": Row(f"{FOLDER} --data-path nowhere", "nowhere/train", "--data-path"),
    "flat val": Row(FOLDER, "data/val", "val/CLASS/", flatten_val),
    "class only in val": Row(FOLDER, "data/val/cat", "remove", lambda: Path("data/val/bee").rename("data/val/cat")),
    "one class": Row(FOLDER, "data/train: fewer than two class folders (ant)", "add", remove_bees),
    "32 bits per pixel": Row(FOLDER, "data/train", "replace or remove it", write_tiffs(np.int32), out=""),
    "floating point": Row(FOLDER, "data/train", "replace or remove it", write_tiffs(np.float32), out=""),
    "no images": Row(FOLDER, "data/train/bee", ".jpg", only_text),
    "too few classes": Row(f"{FOLDER} --nb-classes 1", "--nb-classes 1", "leave it out"),
    "large batch": Row("--batch-size 2000", "--batch-size 2000", "lower it"),
    "repeated batch": Row("--repeated-aug --batch-size 1400", "--batch-size 1400", "--no-repeated-aug"),
    "cut image": Row(FOLDER, "data/train/", "replace or remove it", truncate_photographs, out=""),
    "in a worker": Row(
        f"{FOLDER} --num_workers 1", "data/train/", "replace or remove it", truncate_photographs, out=""
    ),
    # other names of class folders
    "no training split": Row(f"{FOLDER} --train-split training", "data/training: no such folder", "--train-split"),
    "no validation split": Row(f"{FOLDER} --val-split test", "data/test: no such folder", "--val-split"),
    "no database of a split": Row(f"{FOLDER} --use-lmdb --train-split part", "data/part.lmdb", ""),
    "splits of their own": Row(f"{NAMED} SVHN --train-split training", "--data-set SVHN", "leave them out"),
    "splits of a checkpoint's digits": Row(f"{EVAL} --val-split test", "--data-set DIGITS", "leave them out"),
    # parts of the training split
    "fold out of range": Row("--folds 3 --fold 3", "--fold 3", "below --folds, which is 3"),
    "fold without folds": Row("--fold 0", "--fold 0", "--folds, which is 0"),
    "two hold-outs": Row("--val-fraction 0.1 --folds 5", "--val-fraction and --folds", "one of the two"),
    "class below the folds": Row(f"{FOLDER} --folds 5", "--folds 5: class bee has 4 training images", "needs 5"),
    "class below the hold-out": Row(f"{FOLDER} --val-fraction 0.2", "--val-fraction 0.2: class bee", "needs 5"),
    "class below the fraction": Row(f"{FOLDER} --train-fraction 0.1", "--train-fraction 0.1: class bee", "needs 10"),
    "class below both": Row(f"{FOLDER} --train-fraction 0.5 --folds 3", "class bee has 2", "needs 3"),
    "hold-out without labels": Row(
        f"{FOLDER} --use-lmdb --val-fraction 0.1", "--val-fraction", "folder2lmdb.py", copy_published
    ),
    "resumed with a hold-out": Row(f"{RESUME} --val-fraction 0.1", "--val-fraction 0.1", "trained with 0,"),
    "resumed on another fold": Row(
        f"{RESUME} --folds 3 --fold 1",
        "--fold 1",
        "trained with 2,",
        change(lambda s: s["data"].update(folds=3, fold=2)),
    ),
    "resumed without the fraction": Row(
        RESUME, "--train-fraction 1", "trained with 0.5,", change(lambda s: s["data"].update(train_fraction=0.5))
    ),
    "evaluated on training images": Row(f"{EVAL} --folds 5 --fold 1", "--folds 5", "trained with 0,"),
    # data sets of torchvision, without a network
    "no path for MNIST": Row("--data-set MNIST", "--data-set MNIST", "--data-path FOLDER"),
    "no SVHN": Row(f"{NAMED} SVHN", "data: missing or damaged", "/{train,test}_32x32.mat there"),
    "flowers without images": Row(
        f"{NAMED} FLOWERS", "data/flowers-102: ", "102flowers.tgz", lambda: write_text("data/flowers-102/setid.mat")
    ),
    "pets without lists": Row(f"{NAMED} PETS", "trainval.txt", "annotations}.tar.gz", write_pet_folders),
    "food without images": Row(f"{NAMED} FOOD", "data/food-101/images/pie/", "put it back", write_food, out=""),
    "SVHN in a database": Row(f"{NAMED} SVHN --use-lmdb", "--data-set SVHN", "leave it out"),
    # LMDB
    "digits in a database": Row("--use-lmdb", "--use-lmdb", "leave it out"),
    # iNaturalist
    "no list": Row(INAT, "data/train2018.json", "--data-path"),
    "class of no annotation": Row(INAT, "'Parus major'", "one release", write_inat(1)),
    "no first image": Row(INAT, "data/train/group/0/0.jpg", "unpack", write_inat(2)),
    # the checkpoint
    "no checkpoint": Row("--resume nowhere.pth", "nowhere.pth", "checkpoint"),
    "misspelt checkpoint": Row("--resume run/chekpoint.pth", "run/chekpoint.pth", "run/best_checkpoint.pth"),
    "checkpoint is a folder": Row("--resume run", "run:", "checkpoint.pth"),
    "checkpoint is text": Row("--resume run/log.txt", "run/log.txt", "PyTorch file"),
    "checkpoint is words": Row("--resume x.pth", "x.pth", "PyTorch file", lambda: write_text("x.pth", "epoch,loss")),
    "cut checkpoint": Row(RESUME, "run/checkpoint.pth", "use another", lambda: truncate("run/checkpoint.pth")),
    "hostile": Row(EVAL, "posix.system", "save its state_dict alone", change(lambda s: {"args": Hostile()})),
    "hostile, old format": Row(EVAL, "posix.system", "save its state_dict alone", old_hostile),
    "a list": Row(EVAL, "list", "state dict", change(lambda s: [1, 2])),
    "no model": Row(EVAL, "no state dict", "epoch", change(lambda s: {"epoch": 3})),
    "damaged configuration": Row(
        EVAL, "run/checkpoint.pth", "use another", change(lambda s: s["config"].update(kwargs=3))
    ),
    "damaged epoch": Row(RESUME, "epoch", "another", change(lambda s: s.update(epoch="x"))),
    "later version": Row(EVAL, "novelty", "another", change(lambda s: s["config"].update(novelty=1))),
    "safetensors": Row(
        "--eval --resume x.safetensors", "x.safetensors", "use another", lambda: write_text("x.safetensors")
    ),
    "exported folder": Row("--eval --resume x", "x: damaged", "use another", lambda: write_text("x/config.json")),
    "text as weights": Row(EVAL, "run/checkpoint.pth", "cls_token", change(lambda s: s["model"].update(cls_token="x"))),
    "EMA of another model": Row(
        RESUME, "head.bias", "--finetune?", change(lambda s: s["model_ema"].__delitem__("head.bias"))
    ),
    "other depth": Row(f"{EVAL} --model-kwargs depth=2", "blocks.1", "--model-kwargs"),
    "other width": Row(f"{RESUME} --model-kwargs depth=1 embed_dim=48 num_heads=2", "1, 1, 32", "'embed_dim': 32"),
    "other decay": Row(f"{RESUME} --weight-decay 0", "run/checkpoint.pth", "--weight-decay"),
    "other number of classes": Row(f"{FOLDER} {EVAL}", "10 classes and the data 2", "--data-path"),
    "fewer outputs than classes": Row(
        f"{EVAL} --nb-classes 3", "3 outputs and the data 10", "--data-path", change(lambda s: {"model": cut_head(s)})
    ),
    "other classes": Row(RESUME, "class 9 is ten", "--data-path", change(lambda s: s["classes"].__setitem__(9, "ten"))),
    "weights only": Row(RESUME, "weights only", "did you mean --eval or --finetune?", change(lambda s: s["model"])),
    # fine-tuning
    "weights of another depth": Row(
        "--model-kwargs depth=8 --finetune run/checkpoint.pth", "run/checkpoint.pth", "--model-kwargs depth=1"
    ),
    "freeze too many": Row("--freeze 2", "--freeze 2", "a lower number"),
    "freeze no blocks": Row("--model resnet18 --model-kwargs --input-size 32 --freeze 1", "no blocks", "--freeze head"),
    # the teacher
    "one head": Row(
        f"{TEACH} --model dhvt_tiny_cifar_patch4 --model-kwargs", "dhvt_tiny", "--kd needs none", save_teacher()
    ),
    "teacher model": Row(f"{TEACH} --teacher-model test_resne", "test_resne:", "test_resnet", save_teacher()),
    "another teacher": Row(f"{TEACH} --teacher-model resnet10t", "does not fit", "--teacher-model", save_teacher()),
    "classes of a teacher of logits": Row(
        f"{TEACH} --distillation-type none --kd", "7 classes", "these classes", save_teacher(7)
    ),
    "teacher's classes": Row(TEACH, "7 classes", "these classes", save_teacher(7)),
    "teacher's names": Row(TEACH, "class 9 is ten", "--data-path", save_teacher(classes=[*"012345678", "ten"])),
}


@pytest.fixture(scope="module")
def data(tree) -> Path:
    return tree(count=4)


def list_files(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def place(data, tiny_run, tmp_path, monkeypatch) -> Path:
    """Return the current folder, in which data/ and run/ may be spoilt."""
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(data, "data")
    shutil.copytree(tiny_run, "run", ignore=shutil.ignore_patterns("runs"))
    return tmp_path


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_one_line_names_the_fault_and_the_remedy(row, place, tiny_flags, monkeypatch, capfd):
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for name, value in row.env.items():
        monkeypatch.setenv(name, value)
    if row.prepare is not None:
        row.prepare()
    before = list_files(place)
    capfd.readouterr()
    assert main.main([*tiny_flags, *f"{row.out}{row.flags}".split()]) == 2
    error = capfd.readouterr().err
    print(error)
    assert error.count("\n") == 1 and error.startswith("main.py: error: ")
    assert row.value in error and row.remedy in error
    assert list_files(place) == before
