"""What people see of a run: progress, log.txt, TensorBoard, curves.png, args.json."""

import io
import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar
from tqdm import tqdm

from util import checkpoint, distributed


class Progress:
    """A bar on a terminal, plain lines every report otherwise; on rank 0 alone."""

    def __init__(self, total: int, title: str, freq: int, done: int = 0) -> None:
        self.total, self.title, self.freq = total, title, freq
        self.done, self.first, self.started = done, done, time.perf_counter()
        on_terminal = sys.stderr.isatty() and distributed.is_primary()
        self.bar = tqdm(total=total, initial=done, desc=title, dynamic_ncols=True, leave=False) if on_terminal else None

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
        left = (time.perf_counter() - self.started) / (done - self.first) * (self.total - done)
        text = "  ".join(f"{k} {v}" for k, v in figures.items())
        distributed.print0(f"{self.title}  [{done}/{self.total}]  {text}  left {timedelta(seconds=round(left))}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class RunLog:
    """Rank 0's files in --output_dir; every method does nothing on other ranks and without a folder.

    Raises InputError where they cannot be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder if distributed.is_primary() else None
        self.writer: EventsWriter | None = None  # of this thread: an error in another one would end in silence

    def start(self, args: dict[str, Any], start_epoch: int) -> None:
        """Create the folder, write args.json, drop log.txt's lines of epochs that will be run again."""
        if self.folder is None:
            return
        with checkpoint.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_atomic(self.folder / "args.json", (json.dumps(args, indent=1) + "\n").encode())
            kept = [line for line in self.read() if line["epoch"] < start_epoch]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            if kept or (self.folder / "log.txt").exists():
                checkpoint.write_atomic(self.folder / "log.txt", text.encode())
            (self.folder / "runs").mkdir(exist_ok=True)
            self.writer = EventsWriter(str(self.folder / "runs" / "events"), f".{os.getpid()}")

    def read(self) -> list[dict[str, Any]]:
        """Read log.txt; lines that are none of it, as a last one cut short by a crash, are left out."""
        lines = []
        if self.folder is not None and (self.folder / "log.txt").is_file():
            for text in (self.folder / "log.txt").read_text(errors="replace").splitlines():
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    continue
                if isinstance(line, dict) and type(line.get("epoch")) is int:
                    lines.append(line)
        return lines

    def scalars(self, step: int, **values: float) -> None:
        if self.writer is not None:
            with checkpoint.writing(self.folder):
                for name, value in values.items():
                    self.writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))

    def epoch(self, train: dict[str, float], test: dict[str, float], **more: float) -> None:
        """Add a line to log.txt: rate and loss, evaluation if there was one, the rest; times come last."""
        if self.folder is None:
            return
        rate_and_loss = {k: train[k] for k in ("train_lr", "train_loss")}
        speed = {k: v for k, v in train.items() if k not in rate_and_loss}
        with checkpoint.writing(self.folder), open(self.folder / "log.txt", "a") as f:
            f.write(json.dumps(rate_and_loss | test | more | speed) + "\n")
        self.scalars(more["epoch"], **{k: test[k] for k in ("test_acc1", "test_acc5") if k in test})
        with checkpoint.writing(self.folder):
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            with checkpoint.writing(self.folder):
                self.writer.close()
        self.draw()

    def draw(self) -> None:
        """Draw curves.png from log.txt."""
        if lines := self.read():
            with checkpoint.writing(self.folder):
                checkpoint.write_atomic(self.folder / "curves.png", draw_curves(lines))


def draw_curves(lines: list[dict[str, Any]]) -> bytes:
    """Draw loss, accuracy and rate by epoch from the lines of a log.txt: a PNG file."""
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
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


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
