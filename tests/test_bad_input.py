"""What a person can get wrong: one line names it and says what to do, and nothing is written."""

import json
import os
import pickle
import re
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
from util import options
from util.errors import InputError

EVIT = "--model deit_tiny_patch16_shrink_base --model-kwargs patch_size=8 embed_dim=32 num_heads=2 --input-size 32"
TEACH = (
    "--distillation-type hard --teacher-model test_resnet --teacher-path teacher.pth --input-size 32 "
    "--model deit_tiny_distilled_patch16_224 --model-kwargs patch_size=8 embed_dim=48 depth=1 num_heads=2"
)

# flags that contradict themselves or each other: what the line says
COMMAND_LINES = {
    "digits": "digits: no such flag; --help lists the flags",
    "--epochs many": "--epochs: 'many' is not a whole number",
    "--batch-size 0": "--batch-size: 0 must be at least 1",
    "--amp int8": "--amp: invalid choice: 'int8' (choose from",
    "--model-kwargs depth": "--model-kwargs takes KEY=VALUE, not 'depth'",
    "--model-kwargs img_size=64": "--model-kwargs img_size=64: use --input-size",
    "--input-size 32 32 32": "--input-size 32 32 32 must be one number, or height and width",
    "--sched plateau": "--sched: invalid choice: 'plateau' (choose from",
    "--opt-betas 0.9": "--opt-betas 0.9: --opt adamw takes 2",
    "--lr-noise 0 0.2 0.4": "--lr-noise 0.0 0.2 0.4: give one number or two",
    "--cutmix-minmax 0.5": "--cutmix-minmax 0.5: give a minimum and a larger maximum",
    "--freeze=-1": "--freeze -1: give head, or the number of blocks",
    f"{EVIT} --drop_loc 3,x": "--drop_loc: 3,x must be numbers of blocks, for example 3,6,9",
    "--eval": "--eval needs a checkpoint: add --resume FILE",
    "--visualize_attention": "--visualize_attention needs a checkpoint: add --resume FILE",
    "--eval --visualize_attention --resume x": "--eval and --visualize_attention: give one at a time",
    "--use-ema": "--use-ema is for --eval, --finetune and --visualize_*",
    "--image-dir data": "--image-dir is for --visualize_mask and --visualize_attention",
    "--speed-batch-size 2": "--speed-batch-size is for --test_speed and --only_test_speed",
    "--resume auto": "--resume auto looks into --output_dir: give one",
    "--compile --grad-checkpointing": "--compile and --grad-checkpointing: give one",
    "--batch-size 7": "--batch-size 7 must be even",
    "--bce-loss": "add --smoothing 0",
    "--distillation-type soft": "--distillation-type soft needs --teacher-path FILE",
    f"{TEACH} --no-train-mode": "--no-train-mode averages the two heads",
    "--start_epoch 5": "--start_epoch 5 must be below --epochs 1",
}


@pytest.mark.parametrize("flags", COMMAND_LINES)
def test_the_command_line_is_checked_before_anything_is_read(flags, tiny_flags):
    with pytest.raises(InputError) as caught:
        options.parse([*tiny_flags, *flags.split()])
    assert COMMAND_LINES[flags] in str(caught.value) and "\n" not in str(caught.value)


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


def change_checkpoint(change: Callable[[dict], object]) -> Callable[[], None]:
    """Return a preparation that saves run/checkpoint.pth anew as `change` leaves or returns it."""

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
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        content = archive.read(largest)
    data = bytearray(path.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path | str) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(0.6 * len(data))])


def write_text(path: Path | str) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("{}")


def truncate_photographs() -> None:
    for path in Path("data/train").rglob("*.jpg"):
        truncate(path)


def flatten_val() -> None:
    for path in list(Path("data/val").rglob("*.*")):
        path.rename(Path("data/val", f"{path.parent.name}_{path.name}"))
    for path in list(Path("data/val").iterdir()):
        if path.is_dir():
            path.rmdir()


def only_text() -> None:
    for path in Path("data/train/bee").iterdir():
        path.rename(path.with_suffix(".txt"))


def save_teacher(num_classes: int = 10, **more: object) -> Callable[[], None]:
    """Return a preparation that saves teacher.pth, a test_resnet."""

    def prepare() -> None:
        torch.save(
            {"model": timm.create_model("test_resnet", num_classes=num_classes).state_dict(), **more}, "teacher.pth"
        )

    return prepare


def write_inat(change: Callable[[dict, dict], object] = lambda train, val: None) -> Callable[[], None]:
    """Return a preparation that makes data/ a small iNaturalist, its lists as `change` leaves them."""

    def prepare() -> None:
        lists = []
        for split in ("train", "val"):
            files = [f"{split}/group/{k}/{i}.jpg" for k in (0, 1) for i in (0, 2)]
            for name in files:
                Path("data", name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(f"data/{split}/ant/{Path(name).name}", Path("data", name))
            annotations = [{"category_id": k} for k in (0, 0, 1, 1)]
            lists.append({"images": [{"file_name": name} for name in files], "annotations": annotations})
        change(*lists)
        categories = [{"name": "Rosa canina"}, {"name": "Parus major"}]
        for name, content in (("train2018", lists[0]), ("val2018", lists[1]), ("categories", categories)):
            Path("data", f"{name}.json").write_text(json.dumps(content))

    return prepare


def rename_image(name: str) -> Callable[[], None]:
    return write_inat(lambda train, val: train["images"][2].update(file_name=name))


def write_databases(spoil: Callable[[], object]) -> Callable[[], None]:
    """Return a preparation that puts databases in the place of data/train and data/val, and spoils them."""

    def prepare() -> None:
        assert folder2lmdb.main(["--dir", "data"]) == 0
        shutil.rmtree("data/train")
        shutil.rmtree("data/val")
        spoil()

    return prepare


def write_zeros() -> None:
    """Damage each JPEG in data/train.lmdb."""
    path = Path("data/train.lmdb")
    path.write_bytes(path.read_bytes().replace(b"JFIF", bytes(4)))


FOLDER = "--data-set FOLDER --data-path data --batch-size 4"
LMDB = f"{FOLDER} --use-lmdb"
INAT = "--data-set INAT --data-path data --batch-size 2"
CIFAR = "--data-set CIFAR --data-path data"
OFFLINE = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
REBUILD = "python folder2lmdb.py --dir"
RESUME = "--resume run/checkpoint.pth --epochs 2"
FINETUNE = "--finetune run/checkpoint.pth"
EVAL = "--eval --resume run/checkpoint.pth"
ATTENTION = "--visualize_attention --resume run/checkpoint.pth"

ROWS = {
    # device and processes
    "no such device": Row("--device gpu", "--device gpu", "cuda"),
    "another device": Row("--device cuda", "--device cuda", "this machine has cpu"),
    "world size": Row("", "WORLD_SIZE='two'", "number", env={"WORLD_SIZE": "two"}),
    "no rendezvous": Row("", "MASTER_ADDR", "torchrun", env={"WORLD_SIZE": "2"}),
    # the model
    "model": Row("--model dhvt_tiny_cifar_patch", "--model dhvt_tiny_cifar_patch:", "dhvt_tiny_cifar_patch4"),
    "tag": Row("--model resnet18.best --model-kwargs", "resnet18.best", "leave out what follows the dot"),
    "model argument": Row("--model-kwargs dept=1", "dept", "--model-kwargs"),
    "size below a patch": Row(
        "--model vit_tiny_patch16_224 --input-size 8 --model-kwargs", "8x8", "larger --input-size"
    ),
    "no checkpointing": Row(
        "--model pit_ti_224 --model-kwargs --input-size 64 --grad-checkpointing",
        "gradient checkpointing",
        "--grad-checkpointing",
    ),
    "optimizer": Row("--opt adamx", "--opt adamx", "list_optimizers"),
    "policy": Row("--aa rand-x9", "--aa rand-x9", "rand-m9-mstd0.5-inc1"),
    # pictures
    "no such images": Row(f"{ATTENTION} --image-dir nowhere", "--image-dir nowhere", "no such folder", out=""),
    "no images to show": Row(f"{ATTENTION} --image-dir data/train/bee", "data/train/bee", ".jpg", only_text),
    "cut image to show": Row(
        f"{ATTENTION} --image-dir data/train", "data/train/", "replace or remove it", truncate_photographs
    ),
    "pictures into a file": Row(
        f"{ATTENTION} --output_dir data", "visualization", "written", lambda: write_text("data/visualization")
    ),
    "mask of DHVT": Row("--visualize_mask --resume run/checkpoint.pth", "dhvt_tiny_cifar_patch4", "_shrink_base"),
    # the output folder
    "out is a file": Row("--output_dir data/note", "data/note", "name a folder", lambda: write_text("data/note")),
    "out below a file": Row("--output_dir data/note/out", "data/note", "", lambda: write_text("data/note")),
    "out holds a run": Row("--output_dir run", "--output_dir run", "--resume auto"),
    "nothing to evaluate": Row("--eval --resume auto", "checkpoint in out", "name another folder"),
    "nothing to resume": Row(
        "--output_dir run --resume auto",
        "--resume auto",
        "in run can be read",
        lambda: [truncate(path) for path in Path("run").glob("*.pth")],
    ),
    # class folders
    "no data path": Row("--data-set FOLDER", "--data-set FOLDER", "--data-path FOLDER"),
    "no data": Row(f"{FOLDER} --data-path nowhere", "nowhere/train", "--data-path"),
    "flat val": Row(FOLDER, "data/val", "val/CLASS/", flatten_val),
    "class only in val": Row(FOLDER, "data/val/cat", "remove", lambda: Path("data/val/bee").rename("data/val/cat")),
    "no images": Row(FOLDER, "data/train/bee", ".jpg", only_text),
    "too few classes": Row(f"{FOLDER} --nb-classes 1", "--nb-classes 1", "leave it out"),
    "large batch": Row("--batch-size 2000", "--batch-size 2000", "lower it"),
    "repeated batch": Row("--repeated-aug --batch-size 1400", "--batch-size 1400", "--no-repeated-aug"),
    "cut image": Row(FOLDER, "data/train/", "replace or remove it", truncate_photographs, out=""),
    # LMDB
    "digits in a database": Row("--use-lmdb", "--use-lmdb", "leave it out"),
    "no database": Row(LMDB, "data/train.lmdb: no such file", REBUILD),
    "foreign database": Row(LMDB, "data/train.lmdb: not an image", REBUILD, lambda: write_text("data/train.lmdb")),
    "cut database": Row(
        LMDB, "data/train.lmdb: cut short", REBUILD, write_databases(lambda: truncate("data/train.lmdb"))
    ),
    "damaged image in a database": Row(LMDB, "data/train.lmdb: image ", REBUILD, write_databases(write_zeros), out=""),
    # CIFAR, which cannot be downloaded here, and iNaturalist
    "no CIFAR": Row(CIFAR, "data/cifar-100-python.tar.gz", "put https://", env=OFFLINE),
    "damaged CIFAR": Row(
        CIFAR,
        "data/cifar-100-python.tar.gz",
        "remove cifar-100-python/",
        lambda: write_text("data/cifar-100-python/train"),
        OFFLINE,
    ),
    "no list": Row(INAT, "data/train2018.json", "--data-path"),
    "cut list": Row(INAT, "data/val2018.json", "again", lambda: (write_inat()(), truncate("data/val2018.json"))),
    "no annotations": Row(INAT, "'annotations'", "again", write_inat(lambda train, val: train.pop("annotations"))),
    "category beyond": Row(
        INAT, "category 7", "one release", write_inat(lambda train, val: train["annotations"][2].update(category_id=7))
    ),
    "rank": Row(f"{INAT} --inat-category genus", "--inat-category genus", "has name", write_inat()),
    "class of no annotation": Row(
        INAT, "'Rosa canina'", "one release", write_inat(lambda train, val: train["annotations"].__delitem__(slice(2)))
    ),
    "no first image": Row(
        INAT, "data/train/group/0/0.jpg", "unpack", lambda: (write_inat()(), shutil.rmtree("data/train/group"))
    ),
    "image out of the folder": Row(INAT, "'../../1/0.jpg'", "FOLDER/GROUP/ID/IMAGE", rename_image("../../1/0.jpg")),
    # the checkpoint
    "no checkpoint": Row("--resume nowhere.pth", "nowhere.pth", "checkpoint"),
    "checkpoint is a folder": Row("--resume run", "run:", "checkpoint.pth"),
    "checkpoint is text": Row("--resume run/log.txt", "run/log.txt", "PyTorch file"),
    "cut checkpoint": Row(RESUME, "run/checkpoint.pth", "use another", lambda: truncate("run/checkpoint.pth")),
    "flipped byte": Row(RESUME, "run/checkpoint.pth", "older", flip_byte),
    "hostile": Row(EVAL, "posix.system", "save its state_dict alone", change_checkpoint(lambda s: {"args": Hostile()})),
    "hostile, old format": Row(EVAL, "posix.system", "save its state_dict alone", old_hostile),
    "hostile, pickle": Row(EVAL, "posix.system", "save its state_dict alone", bare_hostile),
    "a list": Row(EVAL, "list", "state dict", change_checkpoint(lambda saved: [1, 2])),
    "no model": Row(EVAL, "no state dict", "epoch", change_checkpoint(lambda saved: {"epoch": 3})),
    "damaged configuration": Row(
        EVAL, "run/checkpoint.pth", "use another", change_checkpoint(lambda saved: saved["config"].update(kwargs=3))
    ),
    "damaged epoch": Row(RESUME, "epoch", "another", change_checkpoint(lambda saved: saved.update(epoch="x"))),
    "safetensors": Row(
        "--eval --resume x.safetensors", "x.safetensors", "safetensors", lambda: write_text("x.safetensors")
    ),
    "exported folder": Row(
        "--eval --resume x",
        "x: damaged",
        "use another",
        lambda: (write_text("x/config.json"), truncate("x/config.json")),
    ),
    "text as weights": Row(
        EVAL, "run/checkpoint.pth", "cls_token", change_checkpoint(lambda saved: saved["model"].update(cls_token="x"))
    ),
    "no EMA": Row(
        f"{EVAL} --use-ema",
        "no EMA weights",
        "leave out --use-ema",
        change_checkpoint(lambda saved: saved.update(model_ema=None)),
    ),
    "other depth": Row(f"{EVAL} --model-kwargs depth=2", "blocks.1", "--model-kwargs"),
    "other width": Row(
        f"{RESUME} --model-kwargs depth=1 embed_dim=48 num_heads=2", "1, 1, 32", "did you mean --finetune?"
    ),
    "other decay": Row(f"{RESUME} --weight-decay 0", "run/checkpoint.pth", "--weight-decay"),
    "other number of classes": Row(f"{FOLDER} {EVAL}", "10 classes and the data 2", "--data-path"),
    "other classes": Row(
        RESUME, "class 9 is ten", "--data-path", change_checkpoint(lambda saved: saved["classes"].__setitem__(9, "ten"))
    ),
    "weights only": Row(
        RESUME, "weights only", "did you mean --eval or --finetune?", change_checkpoint(lambda saved: saved["model"])
    ),
    # fine-tuning
    "another model": Row(
        f"{FINETUNE} --model vit_tiny_patch16_224 --input-size 32", "only 11 tensors", "did you mean another --model?"
    ),
    "freeze too many": Row("--freeze 2", "--freeze 2", "a lower number"),
    "freeze no blocks": Row(
        "--model resnet18 --model-kwargs --input-size 32 --freeze 1", "ResNet has no blocks", "--freeze head"
    ),
    # the teacher
    "one head": Row(
        f"{TEACH} --model dhvt_tiny_cifar_patch4 --model-kwargs",
        "--model dhvt_tiny_cifar_patch4",
        "_distilled_patch16_224",
        save_teacher(),
    ),
    "teacher model": Row(f"{TEACH} --teacher-model test_resne", "test_resne:", "test_resnet", save_teacher()),
    "another teacher": Row(f"{TEACH} --teacher-model resnet10t", "does not fit", "--teacher-model", save_teacher()),
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
    if row.flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
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


def test_an_unreadable_image_in_a_worker_ends_the_process_with_the_same_line(place, tiny_flags):
    truncate_photographs()
    command = [sys.executable, main.__file__, *tiny_flags, *FOLDER.split(), "--num_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert re.fullmatch(r"main.py: error: data/train/.*replace or remove it\n", done.stderr)
