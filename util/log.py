"""What people see of a run: progress, log.txt, TensorBoard, curves.png, args.json."""

import json
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from util import checkpoint, distributed


class Progress:
    """A bar on a terminal, plain lines every report otherwise; on rank 0 alone."""

    def __init__(self, total: int, title: str, freq: int) -> None:
        self.total, self.title, self.freq = total, title, freq
        self.done, self.started = 0, time.perf_counter()
        on_terminal = sys.stderr.isatty() and distributed.is_primary()
        self.bar = tqdm(total=total, desc=title, dynamic_ncols=True, leave=False) if on_terminal else None

    def advance(self, done: int) -> None:
        if self.bar is not None:
            self.bar.update(done - self.done)
        self.done = done

    def report(self, done: int, **figures: str) -> None:
        self.advance(done)
        if self.bar is not None:
            self.bar.set_postfix(figures)
            if done < self.total:
                return
            self.close()  # the epoch's last line stays on the screen
        left = (time.perf_counter() - self.started) / done * (self.total - done)
        text = "  ".join(f"{k} {v}" for k, v in figures.items())
        distributed.print0(f"{self.title}  [{done}/{self.total}]  {text}  left {timedelta(seconds=round(left))}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class RunLog:
    """Rank 0's files in --output_dir; every method does nothing on other ranks and without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder if distributed.is_primary() else None
        self.writer: SummaryWriter | None = None

    def start(self, args: dict[str, Any], start_epoch: int) -> None:
        """Create the folder, write args.json, drop log.txt's lines of epochs that will be run again."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomic(self.folder / "args.json", (json.dumps(args, indent=1) + "\n").encode())
        kept = [line for line in self.read() if line["epoch"] < start_epoch]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if kept or (self.folder / "log.txt").exists():
            checkpoint.write_atomic(self.folder / "log.txt", text.encode())
        self.writer = SummaryWriter(str(self.folder / "runs"))

    def read(self) -> list[dict[str, Any]]:
        """Read log.txt; a last line cut short by a crash is left out."""
        lines = []
        if self.folder is not None and (self.folder / "log.txt").is_file():
            for text in (self.folder / "log.txt").read_text().splitlines():
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    continue
        return lines

    def scalars(self, step: int, **values: float) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def epoch(self, train: dict[str, float], test: dict[str, float], **more: float) -> None:
        """Add a line to log.txt: rate and loss, evaluation if there was one, the rest; times come last."""
        if self.folder is None:
            return
        rate_and_loss = {k: train[k] for k in ("train_lr", "train_loss")}
        speed = {k: v for k, v in train.items() if k not in rate_and_loss}
        with open(self.folder / "log.txt", "a") as f:
            f.write(json.dumps(rate_and_loss | test | more | speed) + "\n")
        self.scalars(more["epoch"], **{k: test[k] for k in ("test_acc1", "test_acc5") if k in test})

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        lines = self.read()
        if lines:
            draw_curves(lines, self.folder / "curves.png")


def draw_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, accuracy and rate by epoch from the lines of a log.txt."""
    from matplotlib.figure import Figure  # imported where used: it takes a second, and needs no display this way

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = {
        "loss": ("train_loss", "test_loss", "test_ema_loss"),
        "accuracy (%)": ("test_acc1", "test_acc5", "test_ema_acc1"),
        "learning rate": ("train_lr",),
    }
    for axes, (title, names) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in names:
            points = [(line["epoch"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set_xlabel("epoch")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=100)
    temporary.replace(path)


def describe_versions() -> dict[str, str]:
    """List the versions that shape a result, and this repository's commit."""
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "timm", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found["git"] = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        found["git"] = "unknown"
    return found
