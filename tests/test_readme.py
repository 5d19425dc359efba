"""Every fenced command of README.md, docs/ and BENCHMARKS.md runs, shortened, in the order of the pages."""

import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from test_prepare import WRITE

import engine
import export
import main

ROOT = Path(main.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "BENCHMARKS.md"]
STEP = "--epochs 1 --num_workers 0 --device cpu"
SMALL = f"--model-kwargs depth=1 --input-size 32 --batch-size 4 {STEP}"
EVIT = "--epochs 1 --input-size 16 --device cpu --model-kwargs patch_size=8 embed_dim=16 num_heads=2 depth=5"
DEIT = "--model-kwargs depth=10 embed_dim=48 num_heads=2 --device cpu --num_workers 0"
SPEED = "python speed_test.py dhvt_tiny_imagenet_patch16 deit_tiny_patch16_224"
TINY = "dhvt_tiny_cifar_patch4"
QUICK = "--seconds 0.01 --batch-size 1 --device cpu"
SKIP = "what .ci/run does"

# how a command begins: what is added to shorten it, and what takes the place of words in it
ROWS: dict[str, tuple[str, dict[str, str]]] = {
    "python3 -m venv": (SKIP, {}),
    "python main.py --model dhvt_tiny_imagenet_patch16": (SMALL, {}),
    "python main.py --model dhvt_tiny_cifar_patch4 --data-set SVHN": (SMALL, {"SVHN": "FOLDER"}),
    "python main.py --model dhvt_tiny_imagenet_patch16 --data-set FLOWERS": (SMALL, {"FLOWERS": "FOLDER"}),
    "python main.py --model dhvt_tiny_imagenet_patch16 --data-set FOLDER --data-path DATA --train-split": (
        SMALL,
        {"--train-split training --val-split test": "--train-split train --val-split val"},
    ),
    "for fold in": ("", {"0 1 2 3 4": "0 1", "; done": f" {SMALL}; done"}),
    "python main.py --config recipe.yaml": (f"{STEP} --input-size 32 --batch-size 4 --model-kwargs depth=1", {}),
    "python main.py -c output/mine/args.json": ("--device cpu", {}),
    "python main.py --import": (f"{STEP} --batch-size 4", {}),
    "python main.py --eval": ("--device cpu --num_workers 0", {}),
    "python predict.py": ("--device cpu", {"IMAGES": "DATA/val"}),
    "python export.py": ("", {" --onnx": ""}),  # test_export.py has it
    "python main.py --model deit_tiny_distilled": (SMALL.replace("depth=1", "depth=1 patch_size=8"), {}),
    "python main.py --model deit_small_patch16_shrink_base": (DEIT, {"FILE": "deit_small.pth"}),
    "python prepare.py": ("", {}),
    "python main.py --model resnet18_cifar": (
        f"{STEP} --batch-size 4 --model-kwargs layers=(1,1,1,1) channels=(8,8,8,8)",
        {},
    ),
    "python main.py --model resnet18 --kd": (f"{STEP} --batch-size 4 --input-size 32", {}),
    "python main.py --data-set FOLDER --data-path DATA --input-size": (f"{STEP} --batch-size 16", {}),
    "DATA=clipart bash run_code.sh clipart": (SMALL, {}),
    "DATA=DATA bash run_code.sh small": (SMALL, {}),
    "DATA=CIFAR SEEDS=": (f"--data-set FOLDER {SMALL}", {"DATA=CIFAR": "DATA=DATA", "0 1 2 3": "0"}),
    "python compare.py": ("", {}),
    "bash run_code.sh digits-ablation": (
        "--epochs 1 --warmup-epochs 0 --batch-size 256 --device cpu --model-kwargs depth=1 embed_dim=16 num_heads=2",
        {"bash": "SEEDS=0 bash"},
    ),
    "python main.py --visualize ": ("--device cpu", {"2 5 8 11": "1"}),
    "bash run_code.sh digits-evit": (EVIT, {}),
    "CKPT=output/digits-evit/best_checkpoint.pth bash": (EVIT, {}),
    "python main.py --visualize attention": ("--device cpu", {}),
    "python main.py --only_test_speed": ("--speed-batch-size 1 --device cpu --model-kwargs depth=1", {}),
    f"{SPEED} --batch-size": (f"{QUICK} --input-size 32 --mode inference", {}),
    "torchrun --standalone": (SMALL, {"output/mine": "output/restarted"}),
    "torchrun --nnodes=2": (SMALL, {"=2": "=1", "=8": "=1", "HOST:29400": "127.0.0.1:0", "output/mine": "output/two"}),
    "python run_with_submitit.py": ("", {}),
    "python -m tests.bench_reference": (f"--model {TINY} --pairs 2 --batch-size 2 --device cpu", {}),
    f"{SPEED} dhvt_small": (f"{QUICK} --input-size 32", {}),
    f"{SPEED} --mode": (f"{QUICK} --image-sizes 32 64", {"results/": "output/"}),
    "LD_PRELOAD=": ("--speed-batch-size 1 --device cpu --model-kwargs depth=1", {}),
    "python -m tests.bench_loader": ("--batch-size 4 --pairs 2 --input-size 32", {}),
}
SLOW = ("digits-ablation", "bench_reference", f"{SPEED} dhvt_small", f"{SPEED} --mode", "torchrun", "DATA --input-size")


def commands() -> list[str]:
    """Return the lines of the shell blocks."""
    blocks = [block for page in PAGES for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.M | re.S)]
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def is_slow(command: str) -> bool:
    return any(part in command for part in SLOW)


def row_of(command: str) -> str:
    fitting = [begin for begin in ROWS if command.startswith(begin)]
    assert fitting, f"no row for {command}"
    return max(fitting, key=len)


def test_every_command_has_a_row_and_every_row_a_command():
    assert {row_of(command) for command in commands()} == set(ROWS)


def test_links_lead_to_files_and_ci_runs_the_readmes_tests():
    for page in PAGES:
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / path).exists(), f"{page.name}: {path}"
    start, tests = [command for command in commands() if command.startswith("python3 -m venv")]
    assert start.endswith("pip install -r requirements.txt && bash run_code.sh")
    assert "-r tests/requirements.txt && python -m pytest" in tests
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


@pytest.fixture
def place(tree, tiny_run, tmp_path, monkeypatch) -> Path:
    """Return the current folder: like a clone, with data, a DeiT and the digits' run."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("output", "exported"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "DATA").symlink_to(tree(count=8, side=40))
    deit = timm.create_model("deit_small_patch16_224", num_classes=2, depth=10, embed_dim=48, num_heads=2)
    torch.save(deit.state_dict(), tmp_path / "deit_small.pth")
    shutil.copytree(tiny_run, tmp_path / "output" / "digits")
    # files that docs/configuration.md shows
    for language, name in (("yaml", "recipe.yaml"), ("python", "my_models.py")):
        (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGES[2].read_text(), re.M | re.S)
        (tmp_path / name).write_text(text)
    # as DomainNet's archives and lists
    (tmp_path / "DOMAINNET").mkdir()
    (tmp_path / "DOMAINNET" / "clipart").symlink_to(tmp_path / "DATA" / "train")
    files = sorted((tmp_path / "DATA" / "train").rglob("*.*"))
    lines = [f"clipart/{file.parent.name}/{file.name} {file.parent.name == 'bee':d}\n" for file in files]
    for split, part in (("train", lines[::2]), ("test", lines[1::2])):
        (tmp_path / "DOMAINNET" / f"clipart_{split}.txt").write_text("".join(part))
    # what the other data sets unpack to
    for write in WRITE.values():
        write(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    # scripts leave here what they would run
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(
        f"#!/bin/sh\n[ $1 = -c ] && exec {sys.executable} \"$@\"\nprintf '%s\\n' \"$@\" '' >> launched\n"
    )
    (tmp_path / "bin" / "python").chmod(0o755)
    paths = [tmp_path / "bin", Path(sys.executable).parent, os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, paths)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NGPU", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return tmp_path


def run(command: str) -> int:
    """Run a command, Python's in this process: importing torch again takes longer than most of them."""
    words = shlex.split(command)
    launched = [words[1:]]
    if words[0] != "python":
        status = subprocess.run(["bash", "-c", command], timeout=400, stdout=subprocess.DEVNULL).returncode
        if not Path("launched").exists():
            return status
        launched = [text.splitlines() for text in Path("launched").read_text().split("\n\n")[:-1]]
        Path("launched").unlink()
    for words in launched:
        name, arguments = (words[1], words[2:]) if words[0] == "-m" else (Path(words[0]).stem, words[1:])
        status = importlib.import_module(name).main(arguments)
        if status:
            return status
    return 0


def run_all(chosen: list[str]) -> None:
    for command in chosen:
        more, instead = ROWS[row_of(command)]
        if more != SKIP:
            for word, other in instead.items():
                command = command.replace(word, other)
            assert run(f"{command} {more}") == 0, f"{command} {more}"


def test_the_commands_run_as_they_stand_there(place, monkeypatch):
    benchmark = functools.partial(engine.benchmark, min_seconds=0.01)
    monkeypatch.setattr(engine, "benchmark", benchmark)
    run_all([command for command in commands() if not is_slow(command)])
    for path in (
        "exported/model.safetensors",
        "output/mine/log.txt",
        "output/digits/visualization",
        "clipart/val/bee/1.png",
        "tiny/val/n01443537/val_1.JPEG",
        "slides/val/3/53541-IMG-0.JPG",
        "blood/test/02/000000.png",
        "listed/train/cat/patient1_1.png",
        "output/ablation/compare.csv",
    ):
        assert (place / path).exists()


@pytest.mark.slow
def test_the_long_commands_run_too(place):
    run_all([command for command in commands() if is_slow(command)])


def test_the_lines_of_python_run(place):
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert export.main(["--checkpoint", "output/digits/best_checkpoint.pth", "--out", "exported"]) == 0
    exec(block.replace("FOLDER_OF_THIS_REPOSITORY", str(ROOT)), {})
