"""What a user sees of a run: progress, and the files args.json, log.txt, curves.png and runs/ (TensorBoard)."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from torch import Tensor, nn

from util import distributed
from util.checkpoint import TrainState, explain_write_errors, open_atomic
from util.config import ModelConfig, describe_size
from util.distributed import print0
from util.errors import InputError, NonFiniteLossError, first_line
from util.precision import Precision

# the panels of curves.png: keys of log.txt and their labels
CURVES = {
    "loss": {
        "train_loss": "training loss",
        "test_loss": "test loss",
        "test_ema_loss": "test loss, EMA",
    },
    "accuracy (%)": {
        "test_acc1": "top-1",
        "test_acc5": "top-5",
        "test_ema_acc1": "top-1, EMA",
    },
    "learning rate": {"train_lr": "learning rate"},
}


class EpochProgress:
    """Progress and throughput of an epoch, in lines that rank 0 prints.

    `total` counts the epoch's updates, `first` those that were made before a resume, in `seconds_before` seconds.
    """

    def __init__(self, total: int, title: str, first: int = 0, seconds_before: float = 0.0) -> None:
        self.total = total
        self.title = title
        self.first = first
        self.seconds_before = seconds_before
        self.started = time.perf_counter()
        self.waited = 0.0
        self.images = 0

    def next_batch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return the next batch, and count its images and the time spent waiting for them."""
        started = time.perf_counter()
        images, targets = next(batches)
        self.waited += time.perf_counter() - started
        self.images += len(targets)
        return images, targets

    @property
    def seconds(self) -> float:
        """Return the seconds spent on the epoch, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.started

    def throughput(self) -> dict[str, float]:
        """Return images_per_s of all processes, and data_wait, the share of the time spent waiting for images."""
        seconds = time.perf_counter() - self.started
        return {
            "images_per_s": self.images * distributed.world_size() / seconds,
            "data_wait": self.waited / seconds,
        }

    def report(self, done: int, loss: float, lr: float) -> None:
        """Print that `done` updates of the epoch are made, at least one of them by this process."""
        # updates before a resume, perhaps on another machine, say nothing about the time that is left
        left = (time.perf_counter() - self.started) / (done - self.first) * (self.total - done)
        speed = self.throughput()
        print0(
            f"{self.title}  [{done}/{self.total}]  loss {loss:.4f}  lr {lr:.6f}  images_per_s "
            f"{speed['images_per_s']:.1f}  data {speed['data_wait']:.0%}  left {timedelta(seconds=round(left))}"
        )


class RunLog:
    """A run's files besides its checkpoints, and its Weights & Biases run; written by rank 0, if there is a folder.

    Raises InputError where a file cannot be written. As a context manager it closes however the run ends, and first
    appends a line to log.txt if the run diverged.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder if distributed.is_primary() else None
        # closing it releases the lock, if there is one
        self.lock = contextlib.ExitStack()
        self.events = None
        self.wandb = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind, error: BaseException | None, _) -> None:
        if isinstance(error, NonFiniteLossError) and self.folder is not None:
            finished = [line["epoch"] for line in self.read()]
            self.log_epoch({"epoch": max(finished, default=-1) + 1, "diverged": True})
        self.close()
        if self.wandb is not None:
            # its process may have died of the signal that stops this one
            with contextlib.suppress(ConnectionError):
                self.wandb.finish(exit_code=int(error is not None))

    def start(self, record: dict, start_epoch: int, start_step: int) -> None:
        """Create and lock the folder, write `record` as args.json, and drop what an earlier run logged from here on."""
        if self.folder is None:
            return
        with explain_write_errors(self.folder):
            (self.folder / "runs").mkdir(parents=True, exist_ok=True)
            # nothing is written before the folder is ours
            self._lock_folder()
            with open_atomic(self.folder / "args.json") as file:
                file.write(json.dumps(record, indent=1, default=str).encode())
            lines = "".join(json.dumps(line) + "\n" for line in self.read() if line["epoch"] < start_epoch)
            with open_atomic(self.folder / "log.txt") as file:
                file.write(lines.encode())
            # not SummaryWriter: a full disk ends its thread, and the run would wait for that forever
            self.events = EventsWriter(f"{self.folder}/runs/events")
            # TensorBoard then hides what it has from this update on
            self.events.write_event(Event(step=start_step, session_log=SessionLog(status=SessionLog.START)))

    def start_wandb(self, project: str, run_id: str | None) -> str:
        """Log to Weights & Biases too, to its run `run_id` or a new one; return its id. Raises InputError."""
        try:
            # slow, and an extra
            import wandb

            self.wandb = wandb.init(
                project=project,
                name=self.folder.name,
                dir=self.folder,
                config=json.loads((self.folder / "args.json").read_text()),
                id=run_id,
                resume="allow",
                reinit="create_new",
            )
        except ImportError:
            raise InputError("--log-wandb needs wandb: pip install -r requirements-extra.txt") from None
        except wandb.Error as error:
            raise InputError(f"--log-wandb {project}: {first_line(error)}; or set WANDB_MODE=offline") from None
        # what is logged per epoch is drawn by epoch, the rest by update
        for name in ("loss", "lr", "keep_rate", "train_*", "test_*"):
            self.wandb.define_metric(name, step_metric="epoch" if "_*" in name else "update")
        return self.wandb.id

    def _log_to_wandb(self, **values: float) -> None:
        try:
            if self.wandb is not None:
                self.wandb.log(values)
        except ConnectionError as error:
            print0(f"--log-wandb: {error}; the run goes on without it")
            self.wandb = None

    def _lock_folder(self) -> None:
        """Lock the folder until `close`, or until this process ends in whatever way. Raises InputError."""
        # Windows has no such locks
        try:
            import fcntl
        except ImportError:
            return
        # unlike a lock file, a handle of the folder leaves nothing behind and ends with the process
        handle = os.open(self.folder, os.O_RDONLY)
        self.lock.callback(os.close, handle)
        # a loader's worker that outlives the run by seconds must not hold the lock
        os.register_at_fork(after_in_child=self.lock.close)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--output_dir {self.folder}: another run is writing there now; name another folder"
            ) from None
        # not every file system has locks
        except OSError:
            pass

    def log_updates(
        self,
        first_step: int,
        losses: list[float],
        lr: float,
        keep_rate_schedule: Callable[[int], float] | None = None,
    ) -> None:
        """Log the losses of updates from `first_step` on, with the learning rate and `keep_rate_schedule` of each.

        Steps count the updates of all epochs.
        """
        if self.folder is None:
            return
        with explain_write_errors(self.folder):
            for step, loss in enumerate(losses, first_step):
                scalars = {"loss": loss, "lr": lr}
                if keep_rate_schedule is not None:
                    scalars["keep_rate"] = keep_rate_schedule(step)
                self._add_scalars(step, **scalars)
                self._log_to_wandb(update=step, **scalars)

    def _add_scalars(self, step: int, **scalars: float) -> None:
        for name, value in scalars.items():
            event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            self.events.write_event(event)

    def log_epoch(self, line: dict) -> None:
        """Append a line to log.txt, log its numbers to TensorBoard and Weights & Biases, and draw curves.png."""
        if self.folder is None:
            return
        scalars = {name: value for name, value in line.items() if name.startswith(("train_", "test_"))}
        with explain_write_errors(self.folder):
            self._add_scalars(line["epoch"], **scalars)
            # a full disk is noticed here at the latest
            self.events.flush()
            with open(self.folder / "log.txt", "a") as file:
                file.write(json.dumps(line) + "\n")
            # every epoch, so that a run can be followed and an interrupted one has them
            with open_atomic(self.folder / "curves.png") as file:
                draw_curves(self.read(), self.folder.name).savefig(file, dpi=150)
        self._log_to_wandb(**line)

    def read(self) -> list[dict]:
        """Return the lines of log.txt as dictionaries, one per epoch, oldest first."""
        path = self.folder / "log.txt"
        if not path.exists():
            return []
        lines = []
        for text in path.read_text(errors="replace").splitlines():
            # a crash may have cut the last line short
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
        # the folder may hold a log.txt of something else
        return [line for line in lines if isinstance(line, dict) and "epoch" in line]

    def close(self) -> None:
        """Unlock the folder, and write what is left of the events."""
        # first, as the disk may be full
        self.lock.close()
        if self.events is not None:
            with explain_write_errors(self.folder):
                self.events.close()


def draw_curves(lines: list[dict], title: str) -> Figure:
    """Draw loss, accuracy and learning rate by epoch from the lines of a log.txt."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    # names of folders may hold a dollar sign
    figure.suptitle(title, parse_math=False)
    for number, (name, labels) in enumerate(CURVES.items(), 1):
        axes = figure.add_subplot(1, 3, number, title=name, xlabel="epoch")
        # no ticks between epochs
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        for key, label in labels.items():
            points = [(line["epoch"], line[key]) for line in lines if key in line]
            # top-5 of five classes or fewer says nothing
            if key == "test_acc5" and all(value == 100 for _, value in points):
                continue
            axes.plot(*np.transpose(points), marker=".", label=label)
        # nothing was evaluated yet
        if axes.lines:
            axes.legend()
    return figure


def describe_versions() -> dict[str, str]:
    """Return the versions of what a result depends on, and this repository's commit."""
    versions = {name: import_module(name).__version__ for name in ("torch", "torchvision", "timm", "numpy", "PIL")}
    versions["python"] = sys.version.split()[0]
    # an error message where git, or the repository, is missing
    versions["git"] = subprocess.getoutput(f'git -C "{Path(__file__).parent}" describe --always --dirty --abbrev=40')
    return versions


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def warn_about_downsampling(model: nn.Module, config: ModelConfig) -> None:
    """Warn if a CNN's first layers downsample small images too much."""
    levels = getattr(model, "feature_info", [])
    # the patches of a ViT are for the user to choose
    if hasattr(model, "patch_embed") or max(config.input_size) > 48:
        return
    # in timm's CNNs the first level of features may precede the stem's pooling
    reductions = [level["reduction"] for level in levels[:2] if level["reduction"] >= 4]
    if reductions:
        left = describe_size(tuple(side // reductions[0] for side in config.input_size))
        print0(
            f"Model {config.name} reduces {describe_size(config.input_size)} pixels to {left} in its first layers, "
            "which costs accuracy; the *_cifar models do not: see docs/baselines.md"
        )


def print_run_summary(state: TrainState, images: int, test_images: int, distinct: int) -> None:
    """Print what will be trained on what; `distinct` images are seen per epoch."""
    args = state.args
    epochs = args["epochs"]
    updates = state.updates_per_epoch
    print0(f"Model {state.config.name}; number of params: {count_parameters(state.model)}")
    warn_about_downsampling(state.model, state.config)
    repeated = " (--repeated-aug)" if args["repeated_aug"] else ""
    print0(
        f"{images} training and {test_images} validation images ({state.data.describe_validation()}); an epoch of "
        f"{updates} updates shows {distinct} distinct images{repeated}"
    )

    # Defaults that surprise in short runs and in fine-tuning
    if args["warmup_epochs"] >= epochs:
        print0(f"--warmup-epochs {args['warmup_epochs']}: all {epochs} epochs are warm-up; lower it")
    if not args["train_mode"]:
        print0("The model stays in eval mode: batch norms are frozen, no drop path (--no-train-mode)")
    elif args["finetune"]:
        print0("Fine-tuning in train mode: batch norms follow the data; --no-train-mode freezes them, as published")
    lr = state.initial_lr
    if lr < args["min_lr"]:
        print0(f"The learning rate {lr:g} is below --min-lr {args['min_lr']:g}: raise --lr, or add --unscale-lr")
    remaining = args["model_ema_decay"] ** (updates * epochs)
    # with warm-up the EMA begins as the weights after the first update
    if state.ema is not None and not args["model_ema_warmup"] and remaining > 0.1:
        print0(
            f"--model-ema-decay {args['model_ema_decay']:g}: the EMA will hold {remaining:.0%} of the initial weights; "
            "lower it, or add --model-ema-warmup"
        )


def describe_run(state: TrainState, precision: Precision) -> dict[str, Any]:
    """Return the content of args.json: the flags, and what follows from them on this machine."""
    layout = state.batch_layout
    return {
        **state.args,
        "effective_batch": layout["batch_size"] * layout["processes"] * layout["accum_steps"],
        "effective_lr": state.initial_lr,
        "n_parameters": count_parameters(state.model),
        "processes": layout["processes"],
        "device": distributed.describe(precision.device),
        "precision": str(precision),
        "versions": describe_versions(),
    }


def print_accuracy(test: dict[str, Any]) -> None:
    print0(f"* Acc@1 {test['acc1']:.3f} Acc@{test['topk']} {test['acc5']:.3f} loss {test['loss']:.3f}")
    print0(f"Accuracy of the network on the {test['count']} test images: {test['acc1']:.1f}%")


def describe_speed(row: dict[str, Any]) -> str:
    """Return what engine.benchmark measured as one line."""
    steady = "" if row["steady"] else "unsteady "
    memory = f", peak memory {row['peak_memory_mib']:.0f} MiB" if row["peak_memory_mib"] else ""  # on CUDA only
    return (
        f"{row['images_per_s']:.1f} images/s {steady}± {row['spread']:.1f} % ({row['ms_per_batch']:.1f} ms per batch), "
        f"{row['share']:.0f} % of the device's {row['matrix_gmacs_per_s']:.0f} GMAC/s in matrix products{memory}"
    )


def print_epoch(state: TrainState, evaluated: bool, seconds: float) -> None:
    """Print the best accuracy so far after an evaluation, and the time that is left."""
    if evaluated:
        rate = "" if state.best_keep_rate is None else f" at keep rate {state.best_keep_rate:g}"
        print0(f"Max accuracy: {state.max_accuracy:.2f}%{rate}")
    left = state.args["epochs"] - state.epoch - 1
    if left:
        print0(f"About {timedelta(seconds=round(left * seconds))} left for {left} epochs")


def print_best(state: TrainState) -> None:
    """Print the best accuracies, their epochs, and the command that evaluates the best checkpoint."""
    if state.max_accuracy_ema > 0:
        print0(f"Best EMA accuracy {state.max_accuracy_ema:.2f}% (epoch {state.best_epoch_ema})")
    rate = "" if state.best_keep_rate is None else f", keep rate {state.best_keep_rate:g}"
    text = f"Best accuracy {state.max_accuracy:.2f}% (epoch {state.best_epoch}{rate})"
    if state.folder is None:
        print0(f"{text}; nothing was saved: there is no --output_dir")
        return
    best = state.folder / "best_checkpoint.pth"
    # a run that was resumed in another folder may have had its best epoch before
    file = best if best.exists() else state.folder / "checkpoint.pth"
    test = " (add --split test for the test split)" if state.data.holds_out else ""
    print0(f"{text}; evaluate it with: python main.py --eval --resume {shlex.quote(str(file))}{test}")


def log_line(state: TrainState, stats: dict[str, float], test: dict[str, float]) -> dict[str, float]:
    """Return an epoch's line of log.txt from the numbers of its training and its evaluation."""
    line = {**stats, **test, "epoch": state.epoch, "n_parameters": count_parameters(state.model)}
    if state.keep_rate is not None:
        line["keep_rate"] = state.keep_rate
    return line
