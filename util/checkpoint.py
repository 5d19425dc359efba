"""The state of a run and its checkpoints, saved in an order in which an interruption harms nothing."""

import os
import re
import reprlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from util import distributed
from util.config import DataConfig, ModelConfig
from util.distributed import print0
from util.errors import InputError, first_line
from util.weights import get_weights, load, load_weights, saved_flags

# checkpoint_0012.pth: epoch 12 is finished; checkpoint_0013_000200.pth: 200 updates of epoch 13 are made
NUMBERED = re.compile(r"checkpoint_(\d+)(?:_(\d+))?\.pth")

# what LAMB, Adan and Lookahead count in their parameter groups
GROUP_COUNTERS = ("step", "lookahead_step")

# flags whose change at a resume changes no result
FLAGS_WITHOUT_EFFECT = {
    "given",
    "config",
    "resume",
    "output_dir",
    "device",
    "num_workers",
    "print_freq",
    "checkpoint_interval",
    "keep_checkpoints",
    "log_wandb",
    "save_images",
    "pin_mem",
    "dist_backend",
    "dist_timeout",
    "test_speed",
    "speed_batch_size",
    # accepted for old command lines
    "resplit",
    "cooldown_epochs",
    "patience_epochs",
    "dist_eval",
    "world_size",
    "dist_url",
    "local_rank",
}


@contextmanager
def explain_write_errors(folder: str | Path) -> Iterator[None]:
    """Raise InputError where a write below --output_dir fails within this context."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save wraps the error of the file: look for it in the context
        cause = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        if not cause:
            raise
        raise InputError(
            f"--output_dir {folder}: cannot be written ({cause.strerror or cause}); the last checkpoint "
            "is intact: fix that, and continue with --resume auto"
        ) from None


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` at the end: a reader sees the old file or the new one, whole."""
    # one temporary name per suffix, so that the next write replaces what a killed process left
    temporary = path.with_name(f".new{path.suffix}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            # the content must be on the disk before the name is
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def link_atomic(source: Path, target: Path) -> None:
    """Replace `target` by another name of the file `source`, or by a copy where the file system has no links."""
    # not open_atomic's name: a killed run may leave a hard link here, and writing to it would overwrite a checkpoint
    temporary = target.with_name(".link.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


@dataclass
class TrainState:
    """All progress of a run, and what is saved with it. `state_dict` and `load_state_dict` are each other's inverse."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    lr_scheduler: Scheduler
    scaler: torch.amp.GradScaler
    config: ModelConfig
    data: DataConfig
    classes: Sequence[str]
    # the command line
    args: dict[str, Any]
    updates_per_epoch: int
    folder: Path | None = None
    # progress: the last finished epoch (from 0, -1 before the first), then the part done of the epoch after it
    epoch: int = -1
    update: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    # of the last update
    keep_rate: float | None = None
    # percent, -1 before an evaluation; the epochs are those of best_checkpoint.pth and best_ema_checkpoint.pth
    max_accuracy: float = -1.0
    max_accuracy_ema: float = -1.0
    best_epoch: int | None = None
    best_epoch_ema: int | None = None
    best_keep_rate: float | None = None
    # of --log-wandb
    wandb_id: str | None = None

    PROGRESS = (
        "epoch",
        "keep_rate",
        "max_accuracy",
        "max_accuracy_ema",
        "best_epoch",
        "best_epoch_ema",
        "best_keep_rate",
    )

    @property
    def step(self) -> int:
        """Return the number of updates made, over all epochs."""
        return (self.epoch + 1) * self.updates_per_epoch + self.update

    @property
    def lr(self) -> float:
        """Return the learning rate; with layer decay it is the head's."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def initial_lr(self) -> float:
        """Return the learning rate of the flags, before the schedule; with layer decay it is the head's."""
        return max(group["initial_lr"] for group in self.optimizer.param_groups)

    @property
    def batch_layout(self) -> dict[str, int]:
        """Return what decides which images are in which update: where it changes, no resume is bit-exact."""
        names = ("batch_size", "accum_steps", "seed", "repeated_aug")
        flags = {name: self.args[name] for name in names}
        return {"updates": self.updates_per_epoch, "processes": distributed.world_size(), **flags}

    def finish_epoch(self, test: Mapping[str, float]) -> list[str]:
        """Record an epoch and its evaluation, {} if there was none; return the names under which to save it as best."""
        self.epoch += 1
        self.update = 0
        self.losses = []
        self.seconds = 0.0
        # EViT: accuracies at a higher keep rate, those of a slower model, do not count any more
        rate = self.keep_rate
        if test and rate is not None and (self.best_keep_rate is None or rate < self.best_keep_rate):
            self.max_accuracy = -1.0
            self.max_accuracy_ema = -1.0
            self.best_keep_rate = rate
        best = []
        # of the raw and of the EMA weights
        for ema in ("", "_ema"):
            accuracy = test.get(f"test{ema}_acc1", -1.0)
            if accuracy > getattr(self, f"max_accuracy{ema}"):
                setattr(self, f"max_accuracy{ema}", accuracy)
                setattr(self, f"best_epoch{ema}", self.epoch)
                best.append(f"best{ema}_checkpoint.pth")
        return best

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: tensors and plain values."""
        position = {name: getattr(self, name) for name in ("update", "losses", "seconds")}
        return {
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "args": self.args,
            "config": asdict(self.config),
            "data": asdict(self.data),
            "classes": list(self.classes),
            "wandb_id": self.wandb_id,
            # None between epochs, since a resumed run may batch the next epoch differently
            "position": position | {"conditions": self.batch_layout} if self.update else None,
            **{name: getattr(self, name) for name in self.PROGRESS},
        }

    def load_state_dict(self, saved: Mapping[str, Any], source: str) -> None:
        """Continue from a checkpoint of this program or of the published scripts. Raises InputError.

        Learning rates follow the current flags, as the schedule is a function of the epoch. Changed flags are printed.
        """
        if "optimizer" not in saved:
            raise InputError(f"{source}: holds weights only, no run to resume; did you mean --eval or --finetune?")
        # Weights, and their EMA
        flags = saved_flags(saved)
        model = f"--model {flags.get('model')}, --model-kwargs {flags.get('model_kwargs')}"[:300]
        remedy = f"it was trained with {model}: give the same flags; or did you mean --finetune?"
        weights = get_weights(saved, source)
        load_weights(self.model, weights, source, remedy)
        if self.ema is not None:
            if saved.get("model_ema"):
                weights = get_weights(saved, source, use_ema=True)
            else:
                print0(f"{source}: no EMA in it; the EMA starts from the loaded weights")
            load_weights(self.ema.module, weights, source, remedy)

        # Optimizer state, which is of no use to another kind of optimizer, or to one with other moments
        opt, opt_kwargs = self.args["opt"], self.args["opt_kwargs"]
        now = {"opt": opt.lower(), "opt_kwargs": opt_kwargs}
        before = {"opt": flags.get("opt", opt).lower(), "opt_kwargs": flags.get("opt_kwargs", opt_kwargs)}
        changed = [name for name in now if now[name] != before[name]]
        if changed:
            print0(f"{source}: --{changed[0]} was {before[changed[0]]}; {opt} starts without its state")
        else:
            load_optimizer(self.optimizer, saved["optimizer"], source)
        if saved.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])

        # Position of the run, here and in its log; then report which flags are others now
        self._load_progress(saved, source)
        # a resume into another folder starts a new W&B run
        if self.folder and Path(source).resolve().parent == self.folder.resolve():
            self.wandb_id = saved.get("wandb_id")
        for name, value in self.args.items():
            before = flags.get(name, value)
            if before != value and name not in FLAGS_WITHOUT_EFFECT:
                print0(f"resume: --{name} was {reprlib.repr(before)[:80]} and is {value} from here on")

    def _load_progress(self, saved: Mapping[str, Any], source: str) -> None:
        """Continue at the epoch and update of a checkpoint. Raises InputError."""
        try:
            for name in self.PROGRESS:
                value = saved.get(name)
                if value is not None:
                    # unary plus raises TypeError unless it is a number
                    setattr(self, name, +value)
            position = saved.get("position")
            if not position:
                return
            before = position["conditions"]
            self.losses = [float(loss) for loss in position["losses"]]
            self.seconds = float(position["seconds"])
            self.update = int(position["update"])
            # another batch size or number of processes: continue after the same share of the epoch
            if before != self.batch_layout:
                self.update = self.update * self.updates_per_epoch // before["updates"]
                print0(
                    f"{source}: continues at update {self.update} of {self.updates_per_epoch}, not bit for bit: "
                    f"it was saved with {before}, and now there are {self.batch_layout}"
                )
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(
                f"{source}: damaged, its position in the epoch is unreadable ({first_line(error)}); use another one"
            ) from None

    def save(self, best: Sequence[str] = ()) -> None:
        """Save the run on rank 0 under --output_dir, if there is one; as the files `best` too."""
        if self.folder is not None and distributed.is_primary():
            save_checkpoint(self.state_dict(), self.folder, self.args["keep_checkpoints"], best)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], source: str) -> None:
    """Restore an optimizer's moments and counters; learning rate, weight decay and the like follow the current flags.

    Raises InputError.
    """
    try:
        groups = []
        for now, before in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            counters = {name: before[name] for name in GROUP_COUNTERS if name in before}
            # with the current `fused`, by which torch decides whether a parameter's `step` is on the device
            groups.append({**now, **counters, "params": before["params"]})
        optimizer.load_state_dict({**saved, "param_groups": groups})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{source}: its optimizer state does not fit ({first_line(error)}); was --opt, --weight-decay, "
            "--layer-decay, --freeze or the model different?"
        ) from None
    # fused kernels want the parameters' memory format, which --channels-last may have changed
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def save_checkpoint(content: Mapping[str, Any], folder: Path, keep: int, best: Sequence[str] = ()) -> None:
    """Write one checkpoint under the names in `best`, a numbered name and checkpoint.pth.

    Numbered files of the last `keep` epochs and the newest one are kept; with `keep` 1 none is written. Numbered files
    ahead of this one, left over when a run was resumed from an earlier point, are removed.
    """
    epoch = content["epoch"]
    update = (content.get("position") or {}).get("update", 0)
    numbered = f"checkpoint_{epoch + 1:04d}_{update:06d}.pth" if update else f"checkpoint_{epoch:04d}.pth"
    with explain_write_errors(folder):
        # the best first: a kill in between costs an evaluation, not the best checkpoint
        names = [*best, numbered, "checkpoint.pth"] if keep > 1 else [*best, "checkpoint.pth"]
        first, *others = names
        with open_atomic(folder / first) as file:
            torch.save(content, file)
        for name in others:
            link_atomic(folder / first, folder / name)

        # Remove numbered files that are old, or ahead of this point
        files = numbered_checkpoints(folder)
        past = [position for position in files if position <= (epoch + 1, update)]
        finished = [(epoch, update) for epoch, update in past if not update]
        kept = finished[-keep:] + past[-1:] if keep > 1 else []
        for position, path in files.items():
            if position not in kept:
                path.unlink()


def numbered_checkpoints(folder: Path) -> dict[tuple[int, int], Path]:
    """Return a folder's numbered files by (epoch, updates made of it), oldest first."""
    files = {}
    for path in folder.glob("checkpoint_*.pth"):
        match = NUMBERED.fullmatch(path.name)
        if match:
            epoch, update = match.groups()
            # a finished epoch is the beginning of the next
            files[(int(epoch), int(update)) if update else (int(epoch) + 1, 0)] = path
    return dict(sorted(files.items()))


def find_checkpoints(folder: Path) -> list[Path]:
    """Return a folder's checkpoints that can be resumed, newest first; the best ones are the last resort."""
    named = [folder / name for name in ("checkpoint.pth", "best_checkpoint.pth", "best_ema_checkpoint.pth")]
    return [*reversed(numbered_checkpoints(folder).values()), *filter(Path.is_file, named)]


def resume_after_restart(resume: str, output_dir: str) -> str:
    """Return auto for a run that Slurm or torchrun has started again and that has checkpoints, else `resume`."""
    # it has its original flags, whose --resume may name another run's checkpoint
    if resume and output_dir and distributed.is_restarted() and find_checkpoints(Path(output_dir)):
        return "auto"
    return resume


def check_output_dir(output_dir: str, resume: str) -> None:
    """Refuse a folder that training would overwrite, and print if there is none. Raises InputError."""
    if not output_dir:
        print0("Nothing will be saved: there is no --output_dir")
        return
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: a file; name a folder")
    if resume == "auto" or not find_checkpoints(folder):
        return
    if not resume or Path(resume).resolve().parent != folder.resolve():
        raise InputError(f"--output_dir {folder}: holds a run; continue it with --resume auto, or name another folder")


def resolve_resume(resume: str, output_dir: str) -> str:
    """Return the checkpoint of --resume; for auto rank 0 chooses the newest that can be read, "" if there is none."""
    if resume != "auto":
        return resume
    newest = ""
    paths = find_checkpoints(Path(output_dir)) if distributed.is_primary() else []
    for path in paths:
        try:
            load(path)
            newest = str(path)
            break
        except InputError as error:
            print0(f"--resume auto: skipped {error}")
    newest, count = distributed.broadcast_object((newest, len(paths)))
    if count and not newest:
        raise InputError(f"--resume auto: none of the {count} checkpoints in {output_dir} can be read")
    print0(f"--resume auto: {newest or f'no checkpoint in {output_dir}, starting from the beginning'}")
    return newest
