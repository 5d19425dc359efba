"""One table of what a person can get wrong, and the line that tells them what to do about it."""

import contextlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch

import folder2lmdb
import main

MAIN = Path(main.__file__)
FOLDER = "--data-set FOLDER --data-path data --batch-size 4"


class Row(NamedTuple):
    """A command line, what its one line of complaint names, and the remedy in it."""

    flags: str
    value: str
    remedy: str
    prepare: Callable[[], object] | None = None  # runs in the test's folder: data/ and run/ are its own to spoil
    env: dict[str, str] = {}
    out: str = "--output_dir out "
    process: bool = False  # through `python main.py` rather than main.main


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch marker",)


def change_checkpoint(change: Callable[[dict], object]) -> Callable[[], None]:
    """Give a preparation that saves run/checkpoint.pth anew as `change` leaves or returns it."""

    def prepare() -> None:
        saved = torch.load("run/checkpoint.pth")
        result = change(saved)
        torch.save(saved if result is None else result, "run/checkpoint.pth")

    return prepare


def old_hostile() -> None:
    torch.save({"model": Hostile()}, "run/checkpoint.pth", _use_new_zipfile_serialization=False)


def bare_hostile() -> None:
    Path("run/checkpoint.pth").write_bytes(pickle.dumps(Hostile(), protocol=2))


def flip_byte() -> None:
    """Change one byte in the middle of the largest tensor of run/checkpoint.pth."""
    path = Path("run/checkpoint.pth")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = max((e for e in archive.infolist() if "/data/" in e.filename), key=lambda e: e.file_size)
    start = (
        entry.header_offset + 30 + int.from_bytes(data[entry.header_offset + 26 : entry.header_offset + 28], "little")
    )
    start += int.from_bytes(data[entry.header_offset + 28 : entry.header_offset + 30], "little")
    data[start + entry.file_size // 2] ^= 1
    path.write_bytes(data)


def truncate(path: str, share: float = 0.6) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(share * len(data))])


def each_photograph(split: str, spoil: Callable[[Path], object]) -> Callable[[], None]:
    return lambda: [spoil(path) for path in sorted(Path("data", split).rglob("*.jpg"))]


def write_text(path: Path) -> None:
    path.write_text("not an image")


cut_train = each_photograph("train", truncate)


def cut_val() -> None:
    """Cut the photographs of val/ short, and leave only weights in the checkpoint: it then fits any 10 classes."""
    each_photograph("val", truncate)()
    change_checkpoint(lambda saved: saved["model"])()


def flatten_val() -> None:
    for path in list(Path("data/val").rglob("*.*")):
        path.rename(Path("data/val", f"{path.parent.name}_{path.name}"))
    for path in list(Path("data/val").iterdir()):
        if path.is_dir():
            path.rmdir()


def only_text(folder: str) -> None:
    for path in Path(folder).iterdir():
        path.rename(path.with_suffix(".txt"))


def save_teacher(classes: int = 10, change: Callable[[dict], object] = dict) -> Callable[[], None]:
    """Give a preparation that saves teacher.pth, a test_resnet, as `change` leaves or returns it."""

    def prepare() -> None:
        content = {"model": timm.create_model("test_resnet", num_classes=classes).state_dict()}
        result = change(content)
        torch.save(content if result is None else result, "teacher.pth")

    return prepare


def cut_teacher() -> None:
    save_teacher()()
    truncate("teacher.pth")


def write_inat(change: Callable[[dict, dict, list], object] = lambda train, val, categories: None) -> Callable:
    """Give a preparation that makes data/ a small iNaturalist, its content as `change` leaves it."""

    def prepare() -> None:
        categories = [{"name": "Rosa canina", "order": "Rosales"}, {"name": "Parus major", "order": "Passeriformes"}]
        lists = []
        for split in ("train", "val"):
            files = [f"{split}/group/{k}/{i}.jpg" for k in (0, 1) for i in (0, 2)]
            for name in files:
                Path("data", name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(f"data/{split}/ant/{Path(name).name}", Path("data", name))
            annotations = [{"category_id": k} for k in (0, 0, 1, 1)]
            lists.append({"images": [{"file_name": name} for name in files], "annotations": annotations})
        change(*lists, categories)
        for name, content in (("train2018", lists[0]), ("val2018", lists[1]), ("categories", categories)):
            Path("data", f"{name}.json").write_text(json.dumps(content))

    return prepare


def spoil_inat(spoil: Callable[[], object]) -> Callable[[], None]:
    return lambda: (write_inat()(), spoil())


def rename_image(name: str) -> Callable[[], None]:
    return write_inat(lambda train, val, categories: train["images"][2].update(file_name=name))


def write_half(path: Path) -> None:
    path.unlink()
    with contextlib.closing(folder2lmdb.Writer(path, ["ant"], True, 1 << 20)) as writer:
        writer.add(b"x", 0, "ant/0.jpg")
        writer._flush()


def write_database(path: Path, classes: list[str]) -> None:
    """Write a database of eight images that are none."""
    with contextlib.closing(folder2lmdb.Writer(path, classes, True, 1 << 20)) as writer:
        for i in range(8):
            writer.add(b"not an image", i % len(classes), f"{classes[i % len(classes)]}/{i}.jpg")
        writer.finish()


def put_databases(spoil: Callable[[Path], object]) -> Callable[[], None]:
    """Give a preparation that makes databases of data/, spoils train.lmdb, and removes the folders."""

    def prepare() -> None:
        assert folder2lmdb.main(["--dir", "data"]) == 0
        shutil.rmtree("data/train")
        shutil.rmtree("data/val")
        spoil(Path("data/train.lmdb"))

    return prepare


def spoil_cifar(name: str) -> Callable[[], None]:
    def prepare() -> None:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("not CIFAR")

    return prepare


OFFLINE = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz there"
INAT = "--data-set INAT --data-path data --batch-size 2"
LMDB = f"{FOLDER} --use-lmdb"
REBUILD = "folder2lmdb.py --dir"
RESUME = "--resume run/checkpoint.pth --epochs 2"
FINETUNE = "--finetune run/checkpoint.pth"
EVAL = "--eval --resume run/checkpoint.pth"
TEACH = (
    "--distillation-type hard --teacher-model test_resnet --teacher-path teacher.pth --input-size 32 "
    "--model deit_tiny_distilled_patch16_224 --model-kwargs patch_size=8 embed_dim=48 depth=1 num_heads=2"
)
EVIT = "--model deit_tiny_patch16_shrink_base --model-kwargs patch_size=8 embed_dim=32 num_heads=2 --input-size 32"
ATTENTION = "--visualize_attention --resume run/checkpoint.pth"
EARLY = f"{TEACH} --data-set FOLDER --data-path nowhere"  # it is found before the data are looked for

ROWS = {
    # the command line by itself
    "unknown flag": Row("--bach-size 8", "--bach-size", "did you mean --batch-size?"),
    "one dash": Row("-batch-size 8", "-batch-size", "did you mean --batch-size?"),
    "stray word": Row("digits", "digits", "--help"),
    "not a number": Row("--epochs many", "'many'", "int"),
    "choice": Row("--amp int8", "'int8'", "bf16"),
    "data set": Row("--data-set MNIST", "'MNIST'", "FOLDER"),
    "zero batch": Row("--batch-size 0", "--batch-size 0", "at least 1"),
    "odd batch": Row("--batch-size 7", "--batch-size 7", "even"),
    "no epochs": Row("--epochs 0", "--epochs 0", "at least 1"),
    "seed": Row("--seed 4294967296", "--seed 4294967296", "from 0 to 2147483647"),
    "workers": Row("--num_workers -1", "--num_workers -1", "0 or more"),
    "lr zero": Row("--lr 0", "--lr 0", "above 0"),
    "lr infinite": Row("--lr inf", "--lr inf", "above 0"),
    "lr nan": Row("--lr nan", "--lr nan", "above 0"),
    "mixup": Row("--mixup -0.5", "--mixup -0.5", "0 or more"),
    "cutmix-minmax": Row("--cutmix-minmax 0.5", "--cutmix-minmax 0.5", "two numbers"),
    "smoothing": Row("--smoothing 1.0", "--smoothing 1", "below 1"),
    "bce and smoothing": Row("--bce-loss", "--smoothing 0.1", "add --smoothing 0"),
    "betas": Row("--opt-betas 0.9 1.0", "--opt-betas 0.9 1.0", "below 1"),
    "lr noise": Row("--lr-noise 0.2 1.5", "--lr-noise 0.2 1.5", "from 0 to 1"),
    "start epoch": Row("--start_epoch 5", "--start_epoch 5", "lower it"),
    "digits in a database": Row("--use-lmdb", "--use-lmdb", "leave it out"),
    "one beta": Row("--opt-betas 0.9", "--opt-betas 0.9", "2 numbers"),
    "crop ratio": Row("--eval-crop-ratio 0", "--eval-crop-ratio 0", "above 0"),
    "three sides": Row("--input-size 32 32 32", "--input-size 32 32 32", "height and width"),
    "schedule": Row("--sched cosin", "--sched cosin", "cosine"),
    "plateau": Row("--sched plateau", "--sched plateau", "choose from"),
    "optimizer": Row("--opt adamx", "--opt adamx", "list_optimizers"),
    "policy": Row("--aa rand-x9", "--aa rand-x9", "rand-m9-mstd0.5-inc1"),
    "no policy": Row("--aa always", "--aa always", "rand-m9-mstd0.5-inc1"),
    "EMA without eval": Row("--use-ema", "--use-ema", "--eval"),
    "auto without folder": Row("--resume auto", "--resume auto", "--output_dir", out=""),
    "eval without checkpoint": Row("--eval", "--eval", "--resume FILE"),
    "no data path": Row("--data-set FOLDER", "--data-set FOLDER", "--data-path FOLDER"),
    # device and processes
    "device": Row("--device gpu", "--device gpu", "cuda"),
    "no such device": Row("--device cuda", "--device cuda", "only cpu"),
    "world size": Row("", "WORLD_SIZE='two'", "number", env={"WORLD_SIZE": "two"}),
    "no rendezvous": Row("", "MASTER_ADDR", "torchrun", env={"WORLD_SIZE": "2"}),
    "rank beyond": Row("", "RANK=2", "torchrun", env={"WORLD_SIZE": "2", "RANK": "2"}),
    # the model
    "model": Row("--model dhvt_tiny_cifar_patch", "dhvt_tiny_cifar_patch:", "did you mean dhvt_tiny_cifar_patch4"),
    "model unlike any": Row("--model 7", "--model 7", "timm.list_models()"),
    "no equals sign": Row("--model-kwargs depth", "'depth'", "key=value"),
    "model argument": Row("--model-kwargs dept=1", "dept", "leave out --model-kwargs dept"),
    "heads": Row("--model-kwargs embed_dim=32 num_heads=3", "num_heads=3", "divisible"),
    "no heads": Row("--model-kwargs num_heads=0", "num_heads=0", "by zero"),
    "size twice": Row("--model-kwargs img_size=64", "img_size=64", "--input-size"),
    "classes twice": Row("--model-kwargs num_classes=3", "num_classes=3", "--nb-classes"),
    "tag": Row("--model resnet18.best --model-kwargs", "resnet18.best", "Leave out what follows the dot"),
    "size below a patch": Row(
        "--model vit_tiny_patch16_224 --input-size 8 --model-kwargs", "8x8", "larger --input-size"
    ),
    "no dropout": Row("--model resnet18 --model-kwargs --drop 0.1", "resnet18", "leave out --drop"),
    # token reorganisation and pictures
    "keep rate": Row(f"{EVIT} --base_keep_rate 0", "--base_keep_rate 0", "above 0"),
    "keep rate above one": Row(f"{EVIT} --base_keep_rate 1.5", "--base_keep_rate 1.5", "at most 1"),
    "keep rate of DHVT": Row("--fuse_token", "--fuse_token", "deit_small_patch16_shrink_base"),
    "blocks": Row(f"{EVIT} --drop_loc 3,x", "--drop_loc 3,x", "such as 3,6,9"),
    "block beyond": Row(f"{EVIT} --drop_loc 3,12", "(3, 12)", "from 0 to 11"),
    "keep rate twice": Row("--model-kwargs base_keep_rate=0.5", "base_keep_rate=0.5", "give --base_keep_rate"),
    "shrink before the start": Row(f"{EVIT} --shrink_start_epoch -1", "--shrink_start_epoch -1", "0 or more"),
    "pictures of what": Row("--visualize_attention", "--visualize_attention", "--resume FILE"),
    "both pictures": Row(f"{EVIT} {ATTENTION} --visualize_mask", "--visualize_attention", "one at a time"),
    "pictures and accuracy": Row(f"{ATTENTION} --eval", "--eval", "one at a time"),
    "no pictures": Row(f"{ATTENTION} --n_visualization 0", "--n_visualization 0", "at least 1"),
    "images without pictures": Row("--image-dir data", "--image-dir", "--visualize_mask"),
    "no such images": Row(f"{ATTENTION} --image-dir nowhere", "--image-dir nowhere", "no such folder", out=""),
    "no images to show": Row(
        f"{ATTENTION} --image-dir data/train/bee",
        "--image-dir data/train/bee",
        ".jpg",
        lambda: only_text("data/train/bee"),
    ),
    "cut image to show": Row(f"{ATTENTION} --image-dir data/train", "data/train/", "mend or remove it", cut_train),
    "pictures into a file": Row(
        f"{ATTENTION} --output_dir data", "visualization", "written", lambda: Path("data/visualization").touch()
    ),
    "mask of DHVT": Row(
        "--visualize_mask --resume run/checkpoint.pth", "--visualize_mask", "deit_small_patch16_shrink_base"
    ),
    "attention of a convolution": Row(
        f"{ATTENTION} --model test_resnet --model-kwargs --resume byob.pth",
        "test_resnet",
        "DeiT",
        lambda: torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), "byob.pth"),
    ),
    "text as a position embedding": Row(
        f"{EVIT} --eval --resume text.pth",
        "text.pth",
        "trained with",
        lambda: torch.save({"model": {"pos_embed": "text", "cls_token": "text"}}, "text.pth"),
    ),
    "text as an average": Row(
        f"{EVIT} --eval --use-ema --resume text.pth",
        "text.pth: no model_ema",
        "leave out --use-ema",
        lambda: torch.save({"model": {"a": torch.zeros(1)}, "model_ema": "text"}, "text.pth"),
    ),
    # the output folder
    "out is a file": Row("--output_dir data/note", "data/note", "name a folder", lambda: Path("data/note").touch()),
    "out below a file": Row("--output_dir data/note/out", "data/note", "another", lambda: Path("data/note").touch()),
    "out holds a run": Row("--output_dir run", "--output_dir run", "--resume auto"),
    "nothing to evaluate": Row("--eval --resume auto", "checkpoint in out", "name another folder"),
    "nothing to resume": Row(
        "--output_dir run --resume auto",
        "run",
        "another",
        lambda: [truncate(str(p)) for p in Path("run").glob("*.pth")],
    ),
    # the data
    "no data": Row(f"{FOLDER} --data-path nowhere", "nowhere/train", "--data-path"),
    "no val": Row(FOLDER, "data/val", "--data-path", lambda: shutil.rmtree("data/val")),
    "flat val": Row(FOLDER, "data/val", "val/CLASS/", flatten_val),
    "class only in val": Row(FOLDER, "data/val/cat", "remove it", lambda: Path("data/val/bee").rename("data/val/cat")),
    "no images": Row(FOLDER, "data/train/bee", ".jpg", lambda: only_text("data/train/bee")),
    "no images in val": Row(FOLDER, "data/val/bee", "fill or remove it", lambda: only_text("data/val/bee")),
    "too few classes": Row(f"{FOLDER} --nb-classes 1", "--nb-classes 1", "leave it out"),
    "large batch": Row("--batch-size 2000", "--batch-size 2000", "lower it"),
    "repeated batch": Row("--repeated-aug --batch-size 1400", "--batch-size 1400", "--no-repeated-aug"),
    "cut image": Row(FOLDER, "data/train/", "mend or remove it", cut_train, out=""),
    "cut image, workers": Row(
        f"{FOLDER} --num_workers 2", "data/train/", "mend or remove it", cut_train, out="", process=True
    ),
    "text as image": Row(FOLDER, "data/train/", "mend or remove it", each_photograph("train", write_text), out=""),
    "cut image in val": Row(f"{FOLDER} {EVAL} --nb-classes 10", "data/val/", "mend or remove it", cut_val),
    "no database": Row(LMDB, "data/train.lmdb: no such file", REBUILD),
    "no validation database": Row(
        LMDB, "val.lmdb: no such file", REBUILD, put_databases(lambda path: path.with_name("val.lmdb").unlink())
    ),
    "foreign database": Row(LMDB, "data/train.lmdb: not an image", REBUILD, put_databases(write_text)),
    "cut database": Row(LMDB, "data/train.lmdb: cut short", REBUILD, put_databases(lambda path: truncate(str(path)))),
    "empty database": Row(LMDB, "data/train.lmdb: not an", REBUILD, put_databases(lambda path: path.write_bytes(b""))),
    "half a database": Row(LMDB, "data/train.lmdb: half-written", REBUILD, put_databases(write_half)),
    "database of another class": Row(
        LMDB,
        "val.lmdb: class bee is not among the 1 training classes (ant)",
        "from one folder",
        lambda: (
            put_databases(Path.unlink)(),
            write_database(Path("data/train.lmdb"), ["ant"]),
        ),
    ),
    "damaged image in a database": Row(
        LMDB,
        "data/train.lmdb, image ",
        "mend or remove it",
        put_databases(lambda path: (path.unlink(), write_database(path, ["ant", "bee"]))),
        out="",
    ),
    # CIFAR, which cannot be downloaded here, and iNaturalist
    "no CIFAR": Row(
        "--data-set CIFAR --data-path nowhere", "nowhere/cifar-100-python.tar.gz", f"put {CIFAR}", env=OFFLINE
    ),
    "damaged archive": Row(
        "--data-set CIFAR --data-path data",
        "data/cifar-100-python.tar.gz",
        f"put {CIFAR}",
        spoil_cifar("data/cifar-100-python.tar.gz"),
        OFFLINE,
    ),
    "damaged CIFAR": Row(
        "--data-set CIFAR-10 --data-path data",
        "data/cifar-10-python.tar.gz",
        "remove cifar-10-batches-py/",
        spoil_cifar("data/cifar-10-batches-py/data_batch_1"),
        OFFLINE,
    ),
    "no CIFAR folder": Row("--data-set CIFAR", "--data-set CIFAR", "--data-path FOLDER"),
    "no categories": Row(INAT, "data/categories.json: no such file", "--data-path"),
    "no validation list": Row(
        INAT, "data/val2018.json: no such file", "--data-path", spoil_inat(lambda: Path("data/val2018.json").unlink())
    ),
    "other year": Row(f"{INAT} --data-set INAT19", "data/train2019.json: no such file", "--data-path", write_inat()),
    "cut list": Row(
        INAT, "data/train2018.json", "download it again", spoil_inat(lambda: truncate("data/train2018.json"))
    ),
    "list of another kind": Row(
        INAT,
        "data/categories.json: not a list",
        "again",
        spoil_inat(lambda: Path("data/categories.json").write_text("{}")),
    ),
    "no annotations": Row(
        INAT, "'annotations'", "download it again", write_inat(lambda train, *_: train.pop("annotations"))
    ),
    "no file name": Row(
        INAT,
        "no 'file_name' in 'images', entry 1",
        "download it again",
        write_inat(lambda t, *_: t["images"][1].clear()),
    ),
    "category beyond": Row(
        INAT,
        "data/train2018.json: annotation 2 is of category 7",
        "categories.json has 2",
        write_inat(lambda train, *_: train["annotations"][2].update(category_id=7)),
    ),
    "negative category": Row(
        INAT, "category -1", "from 0", write_inat(lambda train, *_: train["annotations"][0].update(category_id=-1))
    ),
    "rank": Row(f"{INAT} --inat-category genus", "has no 'genus'", "can be one of: name, order", write_inat()),
    "no such rank": Row(f"{INAT} --inat-category tribe", "'tribe'", "supercategory"),
    "class of no annotation": Row(
        INAT,
        "'Rosa canina'",
        "one release",
        write_inat(lambda train, *_: train.update(annotations=[{"category_id": 1}])),
    ),
    "class only in validation": Row(
        INAT,
        "data/val2018.json: val/group/1/0.jpg is of class 'Parus major'",
        "one release",
        write_inat(lambda train, *_: train.update({key: rows[:2] for key, rows in train.items()})),
    ),
    "no first image": Row(
        INAT,
        "data/train/group/0/0.jpg: no such image, nor train/0/0.jpg",
        "unpack",
        spoil_inat(lambda: shutil.rmtree("data/train/group")),
    ),
    "no other image": Row(
        INAT,
        "data/val/group/1/2.jpg: no such image",
        "put it back",
        spoil_inat(lambda: Path("data/val/group/1/2.jpg").unlink()),
        out="",
    ),
    "image out of the folder": Row(INAT, "'../../1/0.jpg'", "folder/group/ID/image.jpg", rename_image("../../1/0.jpg")),
    "absolute image": Row(INAT, "'/etc/1/0.jpg'", "folder/group/ID/image.jpg", rename_image("/etc/1/0.jpg")),
    # the checkpoint
    "no checkpoint": Row("--resume nowhere.pth", "nowhere.pth", "checkpoint"),
    "checkpoint is a folder": Row("--resume run", "run:", "checkpoint.pth"),
    "checkpoint is text": Row("--resume run/log.txt", "run/log.txt", "PyTorch file"),
    "cut checkpoint": Row(RESUME, "run/checkpoint.pth", "older", lambda: truncate("run/checkpoint.pth")),
    "flipped byte": Row(RESUME, "run/checkpoint.pth", "older", flip_byte),
    "hostile": Row(
        EVAL,
        "posix.system",
        "save its state_dict alone",
        change_checkpoint(lambda saved: saved | {"args": Hostile()}),
        process=True,
    ),
    "hostile, old format": Row(EVAL, "posix.system", "save its state_dict alone", old_hostile),
    "hostile, pickle": Row(EVAL, "posix.system", "save its state_dict alone", bare_hostile),
    "a list": Row(EVAL, "list", "state dict", change_checkpoint(lambda saved: [1, 2])),
    "no model": Row(EVAL, "no model", "epoch", change_checkpoint(lambda saved: {"epoch": 3})),
    "other model": Row(f"{EVAL} --model-kwargs depth=2 embed_dim=32 num_heads=2", "blocks.1", "--model-kwargs"),
    "other width": Row(f"{RESUME} --model-kwargs depth=1 embed_dim=48 num_heads=2", "(1, 1, 32)", "--model-kwargs"),
    "other decay": Row(f"{RESUME} --weight-decay 0", "run/checkpoint.pth", "--weight-decay"),
    "other number of classes": Row(f"{FOLDER} {EVAL}", "10 classes", "--data-path"),
    "other classes": Row(
        EVAL, "class 9 is ten", "--data-path", change_checkpoint(lambda saved: saved["classes"].__setitem__(9, "ten"))
    ),
    "weights only, fine-tuned": Row(
        RESUME, "weights only", "did you mean --finetune?", change_checkpoint(lambda saved: saved["model"])
    ),
    "resume with another head": Row(f"{RESUME} --nb-classes 12", "(12, 32)", "did you mean --finetune?"),
    "resume with other classes": Row(f"{FOLDER} {RESUME}", "10 classes, and the data 2", "or did you mean --finetune?"),
    "resume with other parts frozen": Row(f"{RESUME} --freeze head", "run/checkpoint.pth", "--freeze"),
    "resume with layer decay": Row(f"{RESUME} --layer-decay 0.5", "run/checkpoint.pth", "--layer-decay"),
    # fine-tuning
    "nothing to fine-tune": Row("--finetune nowhere.pth", "nowhere.pth", "no such checkpoint"),
    "fine-tune a cut file": Row(FINETUNE, "run/checkpoint.pth", "older", lambda: truncate("run/checkpoint.pth")),
    "fine-tune without EMA": Row(
        f"{FINETUNE} --use-ema",
        "model_ema",
        "leave out --use-ema",
        change_checkpoint(lambda saved: saved.update(model_ema=None)),
    ),
    "fine-tune a DHVT as a ViT": Row(
        f"{FINETUNE} --model vit_tiny_patch16_224 --input-size 32",
        "run/checkpoint.pth: only 11 tensors match",
        "did you mean another --model?",
    ),
    "fine-tune another width": Row(
        f"{FINETUNE} --model-kwargs depth=1 embed_dim=48 num_heads=2",
        "cls_token (1, 1, 32) for (1, 1, 48)",
        "did you mean another --model?",
    ),
    "fine-tune values that are no tensors": Row(
        FINETUNE,
        "only 0 tensors match",
        "did you mean another --model?",
        change_checkpoint(lambda saved: saved.update(model=dict.fromkeys(saved["model"], 1))),
    ),
    "freeze neither": Row("--freeze body", "--freeze body", "head or a number"),
    "freeze below zero": Row("--freeze=-1", "--freeze -1", "head or a number"),
    "freeze too many": Row("--freeze 2", "--freeze 2", "a number up to 1"),
    "freeze no blocks": Row(
        "--model resnet18 --model-kwargs --input-size 32 --freeze 1", "ResNet has no blocks", "--freeze head"
    ),
    "layer decay": Row("--layer-decay 1.5", "--layer-decay 1.5", "at most 1"),
    "weights only": Row(RESUME, "weights only", "--eval", change_checkpoint(lambda saved: saved["model"])),
    "no EMA": Row(
        f"{EVAL} --use-ema",
        "model_ema",
        "leave out --use-ema",
        change_checkpoint(lambda saved: saved.update(model_ema=None)),
    ),
    # the teacher
    "no teacher": Row("--distillation-type soft", "--distillation-type soft", "--teacher-path FILE"),
    "share of the teacher": Row(f"{EARLY} --distillation-alpha 1.5", "--distillation-alpha 1.5", "from 0 to 1"),
    "temperature": Row(f"{EARLY} --distillation-tau 0", "--distillation-tau 0", "above 0"),
    "heads averaged": Row(f"{EARLY} --no-train-mode", "--no-train-mode", "leave it out"),
    "one head": Row(
        f"{EARLY} --model deit_tiny_patch16_224", "deit_tiny_patch16_224", "such as deit_tiny_distilled_patch16_224"
    ),
    "no second head": Row(f"{EARLY} --model pit_ti_224 --model-kwargs --input-size 64", "pit_ti_224", "_distilled_224"),
    "our own has one head": Row(
        f"{EARLY} --model dhvt_tiny_cifar_patch4 --model-kwargs", "dhvt_tiny_cifar_patch4", "_distilled_"
    ),
    "teacher model": Row(f"{EARLY} --teacher-model test_resne", "--teacher-model test_resne", "did you mean test_res"),
    "teacher's tag": Row(f"{EARLY} --teacher-model resnet18.best", "resnet18.best", "Leave out what follows the dot"),
    "no teacher's file": Row(EARLY, "teacher.pth", "no such checkpoint"),
    "cut teacher": Row(EARLY, "teacher.pth", "older", cut_teacher),
    "hostile teacher": Row(
        EARLY, "posix.system", "save its state_dict alone", save_teacher(change=lambda c: c | {"args": Hostile()})
    ),
    "another teacher": Row(f"{EARLY} --teacher-model resnet10t", "layer3", "--teacher-model", save_teacher()),
    "values for weights": Row(
        EARLY, "no tensors", "--teacher-model", save_teacher(change=lambda c: c["model"].update({"fc.weight": 3}))
    ),
    "spoiled teacher": Row(
        EARLY,
        "not finite",
        "older",
        save_teacher(change=lambda c: c["model"].update({"fc.bias": torch.full([10], math.nan)})),
    ),
    "teacher's size": Row(
        f"{EARLY} --teacher-model test_convnext --input-size 24",
        "--teacher-model test_convnext at 24x24",
        "--input-size",
        lambda: torch.save(timm.create_model("test_convnext").state_dict(), "teacher.pth"),
    ),
    "teacher's classes": Row(TEACH, "has 7 classes, and the data 10", "these classes", save_teacher(7)),
    "teacher's names": Row(
        TEACH, "class 9 is ten", "--data-path", save_teacher(change=lambda c: c | {"classes": [*"012345678", "ten"]})
    ),
}


@pytest.fixture(scope="module")
def data(tree) -> Path:
    return tree(count=4)


def list_files(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_one_line_names_the_fault_and_the_remedy(row, data, tiny_run, tiny_flags, tmp_path, monkeypatch, capfd) -> None:
    if row.remedy == "only cpu" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in row.env.items():
        monkeypatch.setenv(name, value)
    shutil.copytree(data, "data")
    shutil.copytree(tiny_run, "run", ignore=shutil.ignore_patterns("runs"))
    if row.prepare is not None:
        row.prepare()
    argv = [*tiny_flags, *f"{row.out}{row.flags}".split()]
    before = list_files(tmp_path)

    if row.process:
        command = [sys.executable, "-W", "ignore:This DataLoader will create", str(MAIN), *argv]  # two on one core
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        status, stderr = done.returncode, done.stderr
    else:
        status, stderr = main.main(argv), capfd.readouterr().err

    print(stderr)
    assert status == 2
    assert stderr.count("\n") == 1 and stderr.startswith("main.py: error: ") and stderr.endswith("\n")
    assert row.value in stderr
    assert row.remedy in stderr
    assert list_files(tmp_path) == before
