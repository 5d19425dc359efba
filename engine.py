"""Training, evaluation and measurement of one model; none of it knows the command line.

The loops follow DeiT's engine (arXiv 2012.12877, https://github.com/facebookresearch/deit); evaluation is exact.
"""

import copy
import math
import statistics
import timeit
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils.benchmark import Timer, timer
from torch.utils.data import DataLoader
from torchprofile import profile_macs

from util import distributed
from util.checkpoint import TrainState
from util.errors import NonFiniteLossError, StoppedError
from util.log import EpochProgress, RunLog
from util.precision import Precision
from util.stop_signal import CONTINUE, STOP, StopSignal

STEADY = 0.03  # spread of a benchmark's calls, as a share of their median
TRAIN_STEP_MACS = 3  # MACs of a forward and backward pass, in multiples of the forward pass


def train_one_epoch(
    model: nn.Module,
    criterion: Callable,
    loader: DataLoader,
    precision: Precision,
    state: TrainState,
    *,
    prepare: Callable,
    seed: int,
    run_log: RunLog,
    stop: StopSignal | None = None,
    accum_steps: int = 1,
    clip_grad: float | None = None,
    mixup: Mixup | None = None,
    keep_rate_schedule: Callable[[int], float] | None = None,
    print_freq: int = 10,
) -> dict[str, float]:
    """Train the rest of the epoch after `state.epoch`; `model` is `state.model`, or its wrapper for several processes.

    `prepare` takes images as loaded to the model's device; `criterion(images, outputs, targets)` is called outside
    autocast; `keep_rate_schedule(update)` is the share of tokens that EViT keeps, updates counted over all epochs. The
    batches left at the end make a last, smaller update. Losses are read every `print_freq` updates: nothing else in the
    loop waits for the device. Returns numbers for log.txt. Raises NonFiniteLossError, and StoppedError once the state
    is saved, on every process alike.
    """
    epoch = state.epoch + 1
    updates = state.updates_per_epoch
    batches = iter(loader)
    progress = EpochProgress(updates, f"Epoch {epoch}", first=state.update, seconds_before=state.seconds)
    pending = []  # losses that are still on the device
    # gradient checkpointing, by timm's name for it, repeats forward passes, which must not update buffers again
    checkpointing = any(getattr(module, "grad_checkpointing", False) for module in model.modules())
    restored = list(model.buffers()) if checkpointing else []

    for update in range(state.update, updates):
        # seed every update, so that a resumed run draws the same random numbers
        distributed.seed_everything(seed, epoch, update)
        if keep_rate_schedule is not None:
            state.keep_rate = keep_rate_schedule(state.step)
        state.optimizer.zero_grad(set_to_none=True)
        # forward and backward pass of each batch of the update
        count = min(accum_steps, len(loader) - update * accum_steps)
        loss = torch.zeros((), device=precision.device)
        for i in range(count):
            images, targets = progress.next_batch(batches)
            images = prepare(images)  # B, C, H, W
            targets = targets.to(precision.device, non_blocking=True)  # B
            if mixup is not None:
                images, targets = mixup(images, targets)  # targets: B, classes
            last = i == count - 1
            loss += backward(model, criterion, images, targets, precision, 1 / count, state.keep_rate, last, restored)
        update_weights(model, state, clip_grad)

        # from here on the update can be saved
        state.update = update + 1
        pending.append(loss)
        request = CONTINUE if stop is None else stop.agree()
        if request or state.update % print_freq == 0 or state.update == updates:
            losses = read_losses(pending, state)
            run_log.log_updates(state.step - len(losses), losses, state.lr, keep_rate_schedule)
            state.seconds = progress.seconds
            progress.report(state.update, statistics.fmean(losses), state.lr)
        if request:
            save_on_request(request, state, stop)
    check_weights(state)
    return {
        "train_lr": state.lr,
        "train_loss": math.fsum(state.losses) / max(1, len(state.losses)),
        **progress.throughput(),
    }


def backward(
    model: nn.Module,
    criterion: Callable,
    images: Tensor,
    targets: Tensor,
    precision: Precision,
    loss_weight: float,
    keep_rate: float | None,
    synchronize: bool,
    restored: Sequence[Tensor] = (),
) -> Tensor:
    """Forward and backward pass of one of an update's batches; return its loss times `loss_weight`.

    `restored` are buffers that keep the values which the forward pass gave them.
    """
    # the processes' gradients are averaged once per update, with its last batch
    averaging = nullcontext() if synchronize or not hasattr(model, "no_sync") else model.no_sync()
    with averaging:
        with precision.autocast():
            outputs = model(images) if keep_rate is None else model(images, keep_rate)
        loss = criterion(images, outputs, targets) * loss_weight
        before = [buffer.clone() for buffer in restored]
        precision.scaler.scale(loss).backward()
        for buffer, value in zip(restored, before, strict=True):
            buffer.copy_(value)
    return loss.detach()


def update_weights(model: nn.Module, state: TrainState, clip_grad: float | None) -> None:
    """Update weights and EMA; gradients are clipped to the norm `clip_grad` if it is given."""
    if clip_grad is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema is not None:
        # without a step the decay is constant; timm counts from 1
        state.ema.update(state.model, state.step + 1 if state.ema.use_warmup else None)


def read_losses(pending: list[Tensor], state: TrainState) -> list[float]:
    """Read the pending losses, each averaged over the processes, into `state`. Raises NonFiniteLossError."""
    losses = distributed.all_reduce(torch.stack(pending)).div_(distributed.world_size()).tolist()
    pending.clear()
    for loss in losses:
        if not math.isfinite(loss):
            raise divergence_error(f"the loss is {loss}", state)
    state.losses += losses
    return losses


def check_weights(state: TrainState) -> None:
    """Raise NonFiniteLossError for weights that the last update has spoiled, before they are saved."""
    tensors = [tensor for tensor in state.model.state_dict().values() if tensor.is_floating_point()]
    spoiled = torch.stack([tensor.isfinite().all() for tensor in tensors]).logical_not().sum()
    if distributed.all_reduce(spoiled).item():
        raise divergence_error("the weights are no longer finite", state)


def divergence_error(reason: str, state: TrainState) -> NonFiniteLossError:
    """Return the error of a training that diverged."""
    grads = [p.grad for p in state.model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(grads).item() if grads else math.nan
    scale = state.scaler.get_scale()
    return NonFiniteLossError(
        f"{reason} in epoch {state.epoch + 1}, update {state.update} (lr {state.lr:.3g}, loss scale {scale:g}, "
        f"last gradient norm {norm:.3g}); try a lower --lr, --clip-grad 1, longer --warmup-epochs, --amp bf16 or off"
        + ("; the last checkpoint is intact: continue with --resume auto" if state.folder else "")
    )


def save_on_request(request: int, state: TrainState, stop: StopSignal) -> None:
    """Save in the middle of an epoch; raise StoppedError if that is what the processes agreed on."""
    check_weights(state)
    state.save()
    if request == STOP:
        # wait for rank 0: launchers kill it soon after the first process has ended
        distributed.all_reduce_max(0)
        raise StoppedError(
            f"stopped by {stop.name} in epoch {state.epoch + 1} after update {state.update}; it is saved, and the same "
            "command with --resume auto continues"
        )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    *,
    prepare: Callable,
    keep_rate: float | None = None,
    stop: StopSignal | None = None,
    collect: list[tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Any]:
    """Evaluate the processes' shares of a data set together; every image counts once for any number of processes.

    `model` has `num_classes` and is not wrapped. Returns loss (mean cross-entropy), acc1 and acc5 (percent; the latter
    is top-min(5, classes)), topk (that number) and count (of images). Each batch's targets [B] and logits [B, classes]
    are appended to `collect`, on the CPU. Raises StoppedError on every process alike.
    """
    model.eval()
    device = precision.device
    topk = min(5, model.num_classes)
    # sums over the share: loss, top-1 hits, top-k hits, images, processes that were asked to stop
    totals = torch.zeros(5, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for images, targets in loader:
        if stop is not None and stop.should_stop():
            totals[4] = 1
            break
        images = prepare(images)  # B, C, H, W
        targets = targets.to(device, non_blocking=True)
        with precision.autocast():
            logits = model(images) if keep_rate is None else model(images, keep_rate)
        logits = logits.float()  # B, classes
        hits = logits.topk(topk, dim=1).indices == targets[:, None]  # B, k
        totals[0] += F.cross_entropy(logits, targets, reduction="none").to(totals.dtype).sum()
        totals[1] += hits[:, 0].sum()
        totals[2] += hits.sum()
        totals[3] += len(targets)
        if collect is not None:
            collect.append((targets.cpu(), logits.cpu()))
    loss, top1, topk_hits, count, stopped = distributed.all_reduce(totals).tolist()
    if stopped:
        raise StoppedError(f"stopped by {stop.name} in an evaluation; --resume auto repeats it: its epoch is saved")
    return {
        "loss": loss / count,
        "acc1": 100 * top1 / count,
        "acc5": 100 * topk_hits / count,
        "topk": topk,
        "count": int(count),
    }


def benchmark(
    model: nn.Module,
    input_size: tuple[int, int],
    batch_size: int,
    precision: Precision,
    *,
    train: bool = False,
    min_seconds: float = 1.0,
    compile_mode: str | None = None,
    gmacs: float,
) -> dict[str, Any]:
    """Measure the throughput of a copy of the model on random images: inference, or training steps with AdamW.

    The copy is compiled if `compile_mode`, a mode of torch.compile, is given. Calls are timed for at least
    `min_seconds`, then until steady (interquartile range within 3 % of the median) or 30 times as long. Returns
    images_per_s and ms_per_batch (medians), spread (interquartile range, % of the median), steady, matrix_gmacs_per_s
    (the rate of plain matrix products), share (% of that rate which the model reaches with its `gmacs` per image: its
    model FLOPs utilisation) and peak_memory_mib (0 except on CUDA).
    """
    step = make_step(model, input_size, batch_size, precision, train, compile_mode)

    # Warm up: the first calls compile, allocate and choose kernels
    distributed.reset_peak_memory(precision.device)
    step_timer = make_timer(step)
    step_timer.timeit(1)
    peak_memory = distributed.peak_memory_mib(precision.device)  # now, since the matrices below take memory too

    measured = step_timer.adaptive_autorange(STEADY, min_run_time=min_seconds, max_run_time=30 * min_seconds)

    # Model FLOPs utilisation: the model's MACs per second over those of plain matrix products of the same dtype
    matrix_gmacs = matrix_rate(precision, min_seconds / 4)
    images_per_s = batch_size / measured.median
    model_gmacs = images_per_s * gmacs * (TRAIN_STEP_MACS if train else 1)
    spread = measured.iqr / measured.median
    return {
        "images_per_s": images_per_s,
        "ms_per_batch": 1000 * measured.median,
        "spread": 100 * spread,
        "steady": spread <= STEADY,
        "matrix_gmacs_per_s": matrix_gmacs,
        "share": 100 * model_gmacs / matrix_gmacs,
        "peak_memory_mib": peak_memory,
    }


def compare_steps(step: Callable, baseline_step: Callable, batch_size: int, pairs: int) -> dict[str, float]:
    """Time two steps in turns, so that whatever slows the machine down for a while slows both.

    Returns the ratio of the baseline's time to the step's (median of `pairs` turns, quartiles ratio_q1 and ratio_q3)
    and the medians images_per_s and baseline_images_per_s.
    """
    # The clock waits for accelerators
    turns = [[timeit.timeit(call, timer=timer, number=1) for call in (step, baseline_step)] for _ in range(2 + pairs)]
    # The first two turns warm up: they compile, allocate and choose kernels
    turns = turns[2:]
    # Of the ratios within a turn, not the ratio of the medians: the machine's speed drifts from turn to turn
    q1, ratio, q3 = statistics.quantiles([b / a for a, b in turns], method="inclusive")
    seconds, baseline_seconds = map(statistics.median, zip(*turns, strict=True))
    return {
        "ratio": ratio,
        "ratio_q1": q1,
        "ratio_q3": q3,
        "images_per_s": batch_size / seconds,
        "baseline_images_per_s": batch_size / baseline_seconds,
    }


def make_step(
    model: nn.Module,
    input_size: tuple[int, int],
    batch_size: int,
    precision: Precision,
    train: bool,
    compile_mode: str | None,
) -> Callable:
    """Return a function that runs a copy of the model on random images: one folded forward pass, or one update."""
    # Already normalised and on the device: loading is measured by tests/bench_loader.py.
    shape = (batch_size, getattr(model, "in_chans", 3), *input_size)
    images = precision.to_memory_format(torch.randn(shape, device=precision.device))
    # Copies, since folding and training change the weights, and training the scale of the loss
    precision = replace(precision)
    model = copy.deepcopy(model).train(train)
    if not train:
        reparameterize_model(model, inplace=True)
    # After folding, which makes new weights
    precision.place(model)
    if compile_mode:
        model.compile(mode=compile_mode)

    @torch.inference_mode()
    def inference_step() -> None:
        with precision.autocast():
            model(images)

    if not train:
        return inference_step
    targets = images.new_zeros(batch_size, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def training_step() -> None:
        optimizer.zero_grad()
        with precision.autocast():
            outputs = model(images)
        loss = F.cross_entropy(outputs.float(), targets)
        precision.scaler.scale(loss).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()

    return training_step


def make_timer(step: Callable) -> Timer:
    """Return a timer of calls, which waits at both ends until an accelerator has finished them."""
    return Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())


def matrix_rate(precision: Precision, seconds: float) -> float:
    """Return the best rate of plain matrix products, in GMAC/s, that the device reached within `seconds`."""
    # Large enough to keep every core busy, small enough to be repeated within `seconds`
    n = 1024 if precision.device.type == "cpu" else 8192
    a = torch.randn(n, n, dtype=precision.dtype, device=precision.device)
    out = torch.empty_like(a)
    measured = make_timer(lambda: torch.mm(a, a, out=out)).blocked_autorange(min_run_time=seconds)
    # The fastest one counts, since anything else that runs on the machine only slows it down
    return n**3 / 1e9 / min(measured.times)


@torch.no_grad()
def count_macs(model: nn.Module, input_size: tuple[int, int]) -> float:
    """Return the GMACs (1 MAC = 2 FLOPs) of one image of `input_size` (height, width) in eval mode, by torchprofile."""
    # In float32 on the CPU, where every model runs; the caller's model stays where it is
    model = copy.deepcopy(model).cpu().float().eval()
    image = torch.zeros(1, getattr(model, "in_chans", 3), *input_size)
    with warnings.catch_warnings():
        # torchprofile uses a deprecated tracer, and lists every operation without products
        warnings.simplefilter("ignore")
        return profile_macs(model, image) / 1e9
