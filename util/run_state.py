"""What a run saves and restores: one symmetrical pair, and where to find it."""

import argparse
import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from util import checkpoint, checks, distributed
from util.distributed import print0
from util.errors import InputError
from util.position import Position, set_random_states

OTHER_WEIGHTS = (
    "give the --model, --input-size, --nb-classes and --model-kwargs it was trained with; or did you mean --finetune?"
)
SILENT = {
    "resume",
    "output_dir",
    "device",
    "eval",
    "num_workers",
    "print_freq",
    "checkpoint_interval",
    "dist_timeout",
}  # changes that change no result


@dataclass
class Progress:
    """How far a run is: the last finished epoch, from 0, and the best accuracies (percent) so far.

    A model that reorganises tokens is best at the lowest keep rate that it was evaluated at: its accuracies with more
    tokens are those of a slower model.
    """

    epoch: int = -1
    max_accuracy: float = 0.0
    max_accuracy_ema: float = 0.0
    best_epoch: int | None = None  # by the raw weights, as best_checkpoint.pth
    best_epoch_ema: int | None = None
    best_keep_rate: float | None = None

    def record(self, epoch: int, test: dict[str, float], keep_rate: float | None = None) -> bool:
        """Note an epoch and its evaluation, if there was one; tell whether it is the best so far."""
        self.epoch = epoch
        if test and keep_rate is not None and (self.best_keep_rate is None or keep_rate < self.best_keep_rate):
            self.best_epoch = self.best_epoch_ema = None
            self.best_keep_rate = keep_rate
        best = "test_acc1" in test and (self.best_epoch is None or test["test_acc1"] > self.max_accuracy)
        if best:
            self.max_accuracy, self.best_epoch = test["test_acc1"], epoch
        ema = test.get("test_ema_acc1")
        if ema is not None and (self.best_epoch_ema is None or ema > self.max_accuracy_ema):
            self.max_accuracy_ema, self.best_epoch_ema = ema, epoch
        return best


@dataclass
class RunState:
    """All that a run changes; random streams only within an epoch, as each begins with fresh ones."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    classes: Sequence[str]
    progress: Progress = field(default_factory=Progress)

    def save(self, args: argparse.Namespace, best: bool, position: dict[str, Any] | None = None) -> None:
        """Write the checkpoint, on rank 0 and if there is an --output_dir; with a `position`, of an epoch begun."""
        if not args.output_dir or not distributed.is_primary():
            return
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "model_ema": None if self.ema is None else self.ema.module.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "args": checkpoint.plain(vars(args)),
            "classes": list(self.classes),
            "position": position,
            **asdict(self.progress),
        }
        with checkpoint.writing(args.output_dir):
            checkpoint.save(content, Path(args.output_dir), args.keep_checkpoints, best)

    def describe(
        self, args: argparse.Namespace, position: Position, updates: int, ranks: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Give a position in an epoch of `updates` as it is saved; `ranks` are not needed after the last of them."""
        conditions = {"updates": updates, "processes": distributed.world_size(), **_conditions(args)}
        found = {"update": position.update, "losses": position.losses, "seconds": position.seconds}
        return found | {"conditions": conditions, "ranks": ranks}

    def restore_position(
        self, saved: dict[str, Any], source: str, args: argparse.Namespace, updates: int, device: torch.device
    ) -> Position:
        """Read what `describe` gave; `updates` are those of an epoch now.

        With other processes, batches or data it goes on after the same share of the epoch, and not bit for bit.
        """
        found = saved.get("position")
        if found is None:
            return Position()
        try:
            position = Position(int(found["update"]), [float(x) for x in found["losses"]], float(found["seconds"]))
            conditions = found["conditions"]
            if not 0 <= len(position.losses) == position.update <= conditions["updates"]:
                raise ValueError(f"{len(position.losses)} losses of {position.update} updates")
            now = {"updates": updates, "processes": distributed.world_size(), **_conditions(args)}
            if conditions == now:
                if position.update < updates:
                    position.own = found["ranks"][distributed.rank()]
                    set_random_states(position.own, device)  # to see it work: it is done again at its time
                return position
            position.update = position.update * updates // max(1, conditions["updates"])
            changed = "; ".join(f"{k} {conditions.get(k)}, now {v}" for k, v in now.items() if conditions.get(k) != v)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"{source}: its position in the epoch is damaged ({reason}); use an older one") from None
        print0(f"{source}: goes on at update {position.update} of {updates}, but not as the run would have: {changed}")
        return position

    def restore(self, saved: dict[str, Any], source: str, args: argparse.Namespace) -> None:
        """Take up what `save` wrote, or a published checkpoint holds.

        Rates follow today's flags: the schedule is a function of the epoch. What changed since is said.
        """
        if "optimizer" not in saved:
            raise InputError(
                f"{source}: weights only, so there is no run to resume; --eval evaluates it; did you mean --finetune?"
            )
        checkpoint.load_weights(self.model, saved["model"], source, remedy=OTHER_WEIGHTS)
        checkpoint.load_optimizer(self.optimizer, saved["optimizer"], source)
        if saved.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            if saved.get("model_ema"):
                checkpoint.load_weights(self.ema.module, saved["model_ema"], source, "EMA weights")
            else:
                checkpoint.load_weights(self.ema.module, saved["model"], source)
                print0(f"{source}: no EMA in it; the average starts from the loaded weights")
        self.progress = Progress(epoch=args.start_epoch - 1)
        for name, default in asdict(Progress()).items():
            value = saved.get(name)
            if value is None:
                continue
            kinds = (int,) if name.startswith(("epoch", "best_epoch")) else (int, float)
            if type(value) not in kinds or value < (default if name == "epoch" else 0):
                raise InputError(
                    f"{source}: damaged, its {name} is {str(checkpoint.plain(value, 1))[:50]}; use another"
                )
            setattr(self.progress, name, value)
        before = checkpoint.flags_of(saved)
        for name, now in checkpoint.plain(vars(args)).items():
            then = checkpoint.plain(before.get(name, now), 2)
            if then != now and now is not None and name not in SILENT:
                print0(f"resume: --{name} was {str(then)[:200]} and is {now} from here on")

    def mend(self, folder: Path, source: Path) -> None:
        """Finish what a run that was killed had left to do in its folder, resumed from `source`."""
        best = self.progress.best_epoch == self.progress.epoch >= 0
        here = source.parent.resolve() == folder.resolve() and source.is_file()
        checkpoint.mend(folder, source if here and best else None)


def _conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Give the flags that say which images come when."""
    return {name: getattr(args, name) for name in ("batch_size", "accum_steps", "seed", "repeated_aug")}


_locks: list[int] = []


def lock(folder: Path) -> None:
    """Keep other runs out of a folder until `unlock`, or the end of this process, however it comes; on rank 0."""
    if not distributed.is_primary() or _locks:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"--output_dir {folder}: another run is writing there now; name another folder") from None
    except OSError:
        pass  # a file system without locks
    _locks.append(handle)


def unlock() -> None:
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=unlock)  # a loader's worker may outlive its run by seconds


def _existing(folder: Path) -> Path:
    """Give the folder, or the nearest above it that is there."""
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())


def check_output_dir(args: argparse.Namespace) -> None:
    """Refuse a folder that cannot be written, that another run is using, or that holds one: training overwrites it."""
    if not args.output_dir:
        return
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder}: it is a file; name a folder")
    parent = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=parent, buffering=0) as file:
            file.write(bytes(4096))
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(
            f"--output_dir {folder}: {parent} cannot be written ({error.strerror}); name another folder"
        ) from None
    if args.eval or checks.find_pictures(args):
        return
    if folder.exists():
        lock(folder)
    if args.resume == "auto" or not checkpoint.find_all(folder):
        return
    if not args.resume or Path(args.resume).resolve().parent != folder.resolve():
        raise InputError(f"--output_dir {folder}: it holds a run; continue it by --resume auto, or name another folder")


def check_room(args: argparse.Namespace, state: RunState) -> None:
    """Refuse a disk that will be full of checkpoints before they are as many as there will be; on rank 0."""
    if not args.output_dir or not distributed.is_primary():
        return
    folder = Path(args.output_dir)
    size = sum(t.numel() * t.element_size() for t in state.model.state_dict().values())
    size = int(size * (3 + (state.ema is not None)))  # weights, an optimizer's two moments, the average
    there = {(s := p.stat()).st_ino: s.st_size for p in checkpoint.find_all(folder)}
    count = args.keep_checkpoints + 2  # the best one, and one that is being written
    free = shutil.disk_usage(_existing(folder)).free
    if free < count * size - sum(there.values()):
        raise InputError(
            f"--output_dir {folder}: {free >> 20:,} MiB are free there, too few for {count} checkpoints of "
            f"{size >> 20:,} MiB; make room, lower --keep-checkpoints, or name another folder"
        )


def load_resumed(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Read --resume on every process; rank 0 chooses what `auto` means. Returns ({}, "") where there is nothing."""
    source = args.resume
    if source == "auto":
        source, found = distributed.broadcast_object(_choose_newest(Path(args.output_dir)))
        if not source and found:
            raise InputError(
                f"--resume auto: none of the {found} checkpoints in {args.output_dir} can be read; name another folder"
            )
        if not source and (args.eval or checks.find_pictures(args)):
            raise InputError(f"--resume auto: no checkpoint in {args.output_dir} to read; name another folder")
        print0(f"--resume auto: {source or f'no checkpoint in {args.output_dir}, starting afresh'}")
    return (checkpoint.load(source), source) if source else ({}, "")


def _choose_newest(folder: Path) -> tuple[str, int]:
    paths = checkpoint.find_all(folder) if distributed.is_primary() else []
    for path in paths:
        try:
            checkpoint.load(path)
            return str(path), len(paths)
        except InputError as error:
            print0(f"--resume auto: passed over {error}")
    return "", len(paths)
