"""Every command of README.md and BENCHMARKS.md runs, shortened, in the order in which they stand there."""

import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from test_distributed import LAUNCHERS

import main
from util import report

ROOT = Path(main.__file__).parent
SMALL = "--input-size 32 --batch-size 4 --epochs 1 --num_workers 0 --device cpu"
QUICK = "--seconds 0.01 --batch-size 1 --device cpu"

# how a command begins: what is added to shorten it, and what takes the place of words in it
ROWS: dict[str, tuple[str, dict[str, str]]] = {
    "python3 -m venv": ("CI runs it", {}),
    "python main.py --model deit_small_patch16_shrink_base": ("--device cpu", {"FILE": "deit_small.pth"}),
    "bash run_code.sh digits-evit": ("--epochs 1 --device cpu", {}),
    "CKPT=output/digits-evit/best_checkpoint.pth bash finetune.sh digits-evit": ("--epochs 1 --device cpu", {}),
    "python speed_test.py deit_small_patch16_shrink_base": ("--batch-size 1 --seconds 0.01 --device cpu", {}),
    "python main.py --model deit_tiny_patch16_shrink_base": ("--device cpu", {}),
    "python main.py --model dhvt_tiny_cifar_patch4 --data-set DIGITS --visualize_attention": ("--device cpu", {}),
    "python main.py --model dhvt_tiny_imagenet_patch16": (SMALL, {}),
    "python main.py --eval": ("--device cpu --num_workers 0", {}),
    "python main.py --model deit_tiny_distilled": (
        f"{SMALL} --model-kwargs patch_size=8 depth=1 --teacher-model test_resnet", {"FILE": "teacher.pth"}
    ),
    "torchrun --standalone": (SMALL, {}),
    "python run_with_submitit.py": ("", {}),
    "torchrun --nnodes=2": (SMALL, {"=2": "=1", "=8": "=1", "HOST:29400": "127.0.0.1:0"}),
    "python predict.py": ("--device cpu", {"IMAGES": "DATA/val"}),
    "python export.py": ("", {}),
    "python main.py --only_test_speed": ("--speed-batch-size 1 --device cpu --model-kwargs depth=1", {}),
    "python speed_test.py dhvt_tiny_imagenet_patch16 deit_tiny_patch16_224 --batch-size": (QUICK, {}),
    "python -m tests.bench_reference": ("--model dhvt_tiny_cifar_patch4 --pairs 2 --batch-size 2 --device cpu", {}),
    "python speed_test.py dhvt_tiny_imagenet_patch16 deit_tiny_patch16_224 dhvt_small": ("--max-batch-size 1", {}),
    "python speed_test.py dhvt_tiny_imagenet_patch16 deit_tiny_patch16_224 --mode": (QUICK, {"results/": "output/"}),
    "python speed_test.py --loader": ("--batch-size 4 --seconds 0.01", {}),
}  # fmt: skip
SLOW = ("python -m tests.bench_reference --compile", "dhvt_small_imagenet_patch16 deit_small_patch16_224 resnet50")


def commands() -> list[str]:
    """List the lines of the shell blocks."""
    found = []
    for name in ("README.md", "BENCHMARKS.md"):
        for block in re.findall(r"^```sh\n(.*?)^```$", (ROOT / name).read_text(), flags=re.M | re.S):
            found += [line for line in block.splitlines() if line and not line.startswith("#")]
    return found


def row_of(command: str) -> str:
    fitting = [begin for begin in ROWS if command.startswith(begin)]
    assert fitting, f"no row for {command}"
    return max(fitting, key=len)


def test_every_row_is_of_a_command():
    assert {row_of(command) for command in commands()} == set(ROWS)


@pytest.fixture
def place(tree, tiny_run, tmp_path, monkeypatch) -> Path:
    """Give a folder like a clone's, with data, checkpoints and the digits' run."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("output", "exported"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "DATA").symlink_to(tree(count=8, side=40))
    for name, model in (("deit_small", "deit_small_patch16_224"), ("teacher", "test_resnet")):
        torch.save(timm.create_model(model, num_classes=2).state_dict(), tmp_path / f"{name}.pth")
    digits = tmp_path / "output" / "digits"
    digits.mkdir(parents=True)
    model = timm.create_model("dhvt_tiny_cifar_patch4", num_classes=10)
    torch.save({"model": model.state_dict()}, digits / "best_checkpoint.pth")
    monkeypatch.chdir(tmp_path)
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return tmp_path


def run(command: str) -> int:
    """Run a command, Python's in this process: importing torch again takes longer than most of them."""
    words = shlex.split(command)
    if words[0] != "python":
        return subprocess.run(["bash", "-c", command], timeout=200, stdout=subprocess.DEVNULL).returncode
    name, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    return importlib.import_module(name).main(arguments)


def walk(chosen: list[str]) -> None:
    for command in chosen:
        more, instead = ROWS[row_of(command)]
        if more == "CI runs it":
            continue
        for word, other in instead.items():
            command = command.replace(word, other)
        started = time.perf_counter()
        assert run(f"{command} {more}") == 0, f"{command} {more}"
        print(f"{time.perf_counter() - started:.1f} s: {command} {more}")


def test_the_commands_run_as_they_stand_there(place, monkeypatch):
    monkeypatch.setattr(report, "benchmark", functools.partial(report.benchmark, min_seconds=0.01, max_seconds=0.1))
    walk([command for command in commands() if not any(part in command for part in SLOW)])
    assert (place / "exported" / "model.onnx").exists() and (place / "output" / "mine" / "log.txt").exists()


@pytest.mark.slow
def test_the_long_commands_run_too(place):
    walk([command for command in commands() if any(part in command for part in SLOW)])


def test_the_lines_of_python_run(place, monkeypatch):
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    import export

    words = ["--model", "dhvt_tiny_cifar_patch4", "--checkpoint", "output/digits/best_checkpoint.pth"]
    assert export.main([*words, "--out", "exported"]) == 0
    exec(block.replace("FOLDER_OF_THIS_REPOSITORY", str(ROOT)), {})
