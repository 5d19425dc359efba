"""Training, evaluation and measurement of one model; none of it knows the command line."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from util import distributed
from util.errors import NonFiniteLossError, PreemptedError
from util.log import Progress
from util.measure import benchmark, compare, count_macs, folded
from util.position import Position
from util.precision import Precision
from util.preemption import NOTHING, STOP
from util.transforms import to_device

__all__ = ["Precision", "StepOptions", "benchmark", "compare", "count_macs", "evaluate", "train_one_epoch"]


@dataclass
class StepOptions:
    """How an update is made: batches summed up, gradient clipping, mixing of images, reports, the model's mode.

    `keep_rate` gives the rate of an update of the epoch, for models that reorganise tokens. The epoch begins at
    `position`, which follows it from report to report. After each update `due` says what is (see util/preemption.py),
    and `keep` saves the position then.
    """

    accum_steps: int = 1
    clip_grad: float | None = None
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    print_freq: int = 10
    on_report: Callable[[int, list[float]], None] | None = None  # first update of the epoch reported, their losses
    train_mode: bool = True
    frozen: Sequence[nn.Module] = ()  # in evaluation mode all the same
    keep_rate: Callable[[int], float] | None = None
    remode: str = "pixel"  # what random erasing fills the boxes with that come with the images
    position: Position = field(default_factory=Position)
    due: Callable[[], int] = lambda: NOTHING
    keep: Callable[[], None] = lambda: None


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor | tuple[Tensor, Tensor], Tensor], Tensor],
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    epoch: int,
    options: StepOptions,
    ema: nn.Module | None = None,
) -> dict[str, float]:
    """Train for one pass over the loader; `model` may be wrapped for several processes.

    `criterion(samples, outputs, targets)` is called outside autocast, with the model's outputs as they are.

    The loss stays on the device and is read every `print_freq` updates, averaged over the processes: nothing else in
    the loop waits for the device. The batches left over at the end make a last, smaller update. Returns train_loss,
    train_lr, images_per_s (all processes) and data_wait (share of the time spent waiting for data). The loader begins
    after the batches of `options.position`, whose updates are not made again, and counts them in its length.

    Raises NonFiniteLossError and, once the position is kept, PreemptedError on every process alike.
    """
    model.train(options.train_mode)
    for module in options.frozen:
        module.eval()
    device, accum, position = precision.device, options.accum_steps, options.position
    batches, updates = len(loader), math.ceil(len(loader) / accum)
    watch = LossWatch(optimizer, precision, epoch, model, position.losses)
    progress = Progress(updates, f"Epoch {epoch}", options.print_freq, position.update)
    meter = Meter(position.seconds)
    source = iter(loader) if position.update < updates else iter(())
    for update in range(position.update, updates):
        count = min(accum, batches - update * accum)
        keep_rate = () if options.keep_rate is None else (options.keep_rate(update),)
        optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=device)
        for k in range(count):
            samples, targets = meter.wait(source)
            samples = precision.lay_out(to_device(samples, device, options.remode))
            targets = targets.to(device, non_blocking=True)
            if options.mixup is not None:
                samples, targets = options.mixup(samples, targets)
            loss_sum += backward(model, criterion, samples, targets, precision, count, k == count - 1, keep_rate)
        apply_gradients(model, optimizer, precision, options.clip_grad)
        if ema is not None:
            ema.update(distributed.unwrap(model))
        watch.add(loss_sum)
        due = options.due()
        if due or (update + 1) % options.print_freq == 0 or update + 1 == updates:
            report(watch, progress, meter, update + 1, options)
        else:
            progress.advance(update + 1)
        if due:
            watch.check_weights()
            options.keep()
        if due == STOP:
            progress.close()
            raise PreemptedError(f"in epoch {epoch} after update {update + 1} of {updates}")
    progress.close()
    watch.check_weights()
    return {
        "train_loss": math.fsum(watch.losses) / len(watch.losses),
        "train_lr": watch.lr,
        "images_per_s": meter.images_per_s,
        "data_wait": meter.data_wait,
    }


class Meter:
    """Count this process's images and the seconds in which it waited for them; `before` passed in an earlier run."""

    def __init__(self, before: float = 0.0) -> None:
        self.started, self.waited, self.images, self.before = time.perf_counter(), 0.0, 0, before

    def wait(self, source: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        samples, targets = next(source)
        self.waited += time.perf_counter() - started
        self.images += len(targets)
        return samples, targets

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def images_per_s(self) -> float:
        """Give the rate of all processes."""
        return self.images * distributed.world_size() / self.elapsed

    @property
    def data_wait(self) -> float:
        return self.waited / self.elapsed


def report(watch: "LossWatch", progress: Progress, meter: Meter, done: int, options: StepOptions) -> None:
    """Read the losses since the last report, and tell of them; `done` updates of the epoch are made."""
    losses = watch.read()
    options.position.update, options.position.seconds = done, meter.before + meter.elapsed
    if options.on_report is not None:
        options.on_report(done - len(losses), losses)
    progress.report(
        done,
        loss=f"{statistics.fmean(losses):.4f}",
        lr=f"{watch.lr:.6f}",
        images_per_s=f"{meter.images_per_s:.1f}",
        data=f"{meter.data_wait:.0%}",
    )


def backward(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor | tuple[Tensor, Tensor], Tensor], Tensor],
    samples: Tensor,
    targets: Tensor,
    precision: Precision,
    count: int,
    last: bool,
    keep_rate: tuple[float, ...] = (),
) -> Tensor:
    """Add the gradients of one of an update's `count` batches, and give its part of the loss.

    The processes' gradients are summed up with the `last`.
    """
    with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
        with precision.autocast():
            outputs = model(samples, *keep_rate)
        loss = criterion(samples, outputs, targets) / count
        precision.scaler.scale(loss).backward()
    return loss.detach()


def apply_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision, clip_grad: float | None
) -> None:
    """Make an update of the gradients, clipped to the norm `clip_grad` if there is one."""
    if clip_grad is not None:
        precision.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    precision.scaler.step(optimizer)
    precision.scaler.update()


class LossWatch:
    """Collect losses on the device, read them together, and stop every process when one is not finite."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        epoch: int,
        model: nn.Module,
        losses: list[float],
    ) -> None:
        self.optimizer, self.precision, self.epoch, self.model = optimizer, precision, epoch, model
        self.window: list[Tensor] = []
        self.losses = losses  # of the epoch's updates so far; it grows

    @property
    def lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def add(self, loss: Tensor) -> None:
        self.window.append(loss)

    def read(self) -> list[float]:
        """Wait for the device; return the losses since the last call, the mean over the processes of each."""
        losses = distributed.all_reduce(torch.stack(self.window)).div_(distributed.world_size()).tolist()
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                self._stop(f"loss is {loss}", len(self.losses) + i)
        self.window.clear()
        self.losses += losses
        return losses

    def check_weights(self) -> None:
        """Refuse weights that the epoch's last update has spoiled: they would be saved."""
        tensors = [t.detach() for t in distributed.unwrap(self.model).state_dict().values() if t.is_floating_point()]
        spoiled = torch.stack([t.isfinite().all() for t in tensors]).logical_not().sum()
        if distributed.all_reduce(spoiled).item():
            self._stop("the weights are no longer finite", len(self.losses) - 1)

    def _stop(self, what: str, update: int) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads).item() if grads else float("nan")
        scale = self.precision.scaler.get_scale() if self.precision.scaler.is_enabled() else 1.0
        raise NonFiniteLossError(
            f"{what} in epoch {self.epoch}, step {update} (lr {self.lr:.3g}, loss scale {scale:g}, last gradient norm "
            f"{norm:.3g}); the last checkpoint, if any, is kept; try a lower --lr, --clip-grad 1, longer "
            "--warmup-epochs, or --amp bf16 or off, and go on with --resume"
        )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    precision: Precision,
    keep_rate: float | None = None,
    due: Callable[[], int] | None = None,
) -> dict[str, float]:
    """Evaluate all processes' shares together; every sample counts once, whatever the number of processes.

    Returns loss (mean cross-entropy), acc1 and acc5 (percent; the second is top-min(5, classes)), topk (that number)
    and count (of images). `model` is not the one wrapped for several processes, and has `num_classes`; `keep_rate`
    is for one that reorganises tokens, in place of its own. Raises PreemptedError on every process when `due` says
    STOP (see util/preemption.py).
    """
    model.eval()
    asked = distributed.smallest(len(loader)) if due is not None else 0  # a share may have a batch more than another
    rate = () if keep_rate is None else (keep_rate,)
    device, topk = precision.device, min(5, model.num_classes)
    hits = torch.zeros(2, dtype=torch.int64, device=device)  # top-1, top-k
    loss = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    count = 0
    with folded(model):
        for i, (samples, targets) in enumerate(loader):
            if i < asked and due() == STOP:
                raise PreemptedError("in its evaluation")
            samples = precision.lay_out(to_device(samples, device))
            targets = targets.to(device, non_blocking=True)
            with precision.autocast():
                logits = model(samples, *rate)
            logits = logits.float()  # B, classes
            loss += F.cross_entropy(logits, targets, reduction="none").to(loss.dtype).sum()
            found = logits.topk(topk, dim=1).indices == targets[:, None]  # B, k
            hits += torch.stack([found[:, 0].sum(), found.sum()])
            count += len(targets)
    total = torch.cat([loss[None], hits.to(loss.dtype), torch.full_like(loss[None], count)])
    loss, top1, top5, count = distributed.all_reduce(total).tolist()
    return {
        "loss": loss / count,
        "acc1": 100 * top1 / count,
        "acc5": 100 * top5 / count,
        "topk": topk,
        "count": int(count),
    }
