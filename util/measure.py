"""Measuring models and loaders: images/s, MACs, and what the machine could do at best."""

import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchprofile import profile_macs

from util import distributed
from util.precision import Precision

STEADY = 3.0  # percent within which the last five repeats lie when a benchmark is done
BACKWARD = 3  # a training step's products, in those of a forward pass


@contextmanager
def folded(model: nn.Module) -> Iterator[nn.Module]:
    """Have a model that can fold its norms do so for a while, in evaluation mode."""
    fold = getattr(model, "fold_norms", None)
    if fold is None or model.training:
        yield model
        return
    fold()
    try:
        yield model
    finally:
        model.unfold_norms()


def benchmark(
    model: nn.Module,
    input_size: tuple[int, int],
    batch_size: int,
    precision: Precision,
    train: bool = False,
    repeats: int = 5,
    min_seconds: float = 1.0,
    max_seconds: float | None = None,
    compiled: bool = False,
    gmacs: float | None = None,
) -> dict[str, float | str | bool]:
    """Measure images/s on random images of `input_size` (height, width): inference, or whole training steps (AdamW).

    Warms up, then times repeats of `min_seconds` each, waiting for the device at both ends, until the last five
    (`repeats`) lie within 3 % or `max_seconds` have passed, by default 30 times `min_seconds`. Copies are measured,
    with batch norms folded in inference; the model stays as it is. Returns

    - of those repeats: the median (images_per_s, ms_per_batch), the spread (percent, largest to smallest around the
      median) and whether that is `steady`;
    - matrix_gmacs_per_s: plain matrix products in the same precision in the same run, and the `share` of that rate
      that the model's own products reach (percent). They are `gmacs` an image, counted where it is None; a training
      step counts as three forward passes;
    - peak_memory_mib (of the device; on the CPU, of the process), and the conditions.
    """
    device, max_seconds = precision.device, 30 * min_seconds if max_seconds is None else max_seconds
    gmacs = count_macs(model, input_size) if gmacs is None else gmacs
    images = precision.lay_out(torch.randn(batch_size, getattr(model, "in_chans", 3), *input_size, device=device))
    run = make_step(model, images, precision, train, compiled)
    distributed.reset_peak_memory(device)
    loops, seconds = 1, _timed(run, 1, device)  # the first pass is never counted
    while (seconds := _timed(run, loops, device)) < min_seconds:
        loops = max(loops + 1, math.ceil(1.1 * loops * min_seconds / max(seconds, 1e-6)))
    rates = [matrix_rate(precision, min_seconds / 4)]
    repeats, times, started = max(5, repeats), [], time.perf_counter()
    while len(times) < repeats or (_spread(times[-repeats:]) > STEADY and time.perf_counter() - started < max_seconds):
        times.append(_timed(run, loops, device) / loops)
    rates.append(matrix_rate(precision, min_seconds / 4))
    times = times[-repeats:]
    median, rate = statistics.median(times), statistics.fmean(rates)
    return {
        "mode": "train" if train else "inference",
        "images_per_s": batch_size / median,
        "ms_per_batch": 1000 * median,
        "spread": _spread(times),
        "steady": _spread(times) <= STEADY,
        "matrix_gmacs_per_s": rate,
        "share": 100 * gmacs * (BACKWARD if train else 1) * batch_size / median / rate,
        "peak_memory_mib": distributed.peak_memory_mib(device),
        "batch_size": batch_size,
        "input_size": f"{input_size[0]}x{input_size[1]}",
        "precision": str(precision) + ", compiled" * compiled,
        "device": distributed.describe(device),
        "torch": torch.__version__,
    }


def compare(
    model: nn.Module,
    baseline: nn.Module,
    input_size: tuple[int, int],
    batch_size: int,
    precision: Precision,
    train: bool = False,
    pairs: int = 15,
    compiled: bool = False,
    baseline_size: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Time two models in turns, on random images, and give how many times as fast the first is.

    Returns what `compare_steps` does; `baseline_size` is the baseline's input size where it is another.
    """
    steps = []
    for each, size in ((model, input_size), (baseline, baseline_size or input_size)):
        images = torch.randn(batch_size, getattr(each, "in_chans", 3), *size, device=precision.device)
        steps.append(make_step(each, precision.lay_out(images), precision, train, compiled))
    return compare_steps(*steps, batch_size, precision.device, pairs)


def compare_steps(
    ours: Callable[[], None], theirs: Callable[[], None], batch_size: int, device: torch.device, pairs: int
) -> dict[str, float]:
    """Time two steps in turns: what disturbs the machine for a while disturbs both.

    Returns the medians of `pairs` turns: ratio of their time to ours with its quartiles (ratio_q1, ratio_q3), and
    images/s of both (images_per_s, baseline_images_per_s).
    """
    for run in (ours, theirs):
        _timed(run, 2, device)
    times = [[_timed(run, 1, device) for run in (ours, theirs)] for _ in range(pairs)]
    q1, ratio, q3 = statistics.quantiles([b / a for a, b in times], n=4, method="inclusive")
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "ratio": ratio,
        "ratio_q1": q1,
        "ratio_q3": q3,
        "images_per_s": batch_size / first,
        "baseline_images_per_s": batch_size / second,
    }


def make_step(
    model: nn.Module, images: Tensor, precision: Precision, train: bool = False, compiled: bool = False
) -> Callable[[], None]:
    """Give a function that runs a copy of the model on the images once: forward with norms folded, or a whole step."""
    model = copy.deepcopy(model).train(train)
    if precision.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if not train and hasattr(model, "fold_norms"):
        model.fold_norms()
    if compiled:
        model.compile()
    return (_training_step if train else _inference_step)(model, images, precision)


def _inference_step(model: nn.Module, images: Tensor, precision: Precision) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        with precision.autocast():
            model(images)

    return run


def _training_step(model: nn.Module, images: Tensor, precision: Precision) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=can_fuse(images.device))
    targets = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            outputs = model(images)
        precision.scaler.scale(F.cross_entropy(outputs.float(), targets)).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()

    return run


def can_fuse(device: torch.device) -> bool:
    """Tell whether torch has the optimizers Adam and AdamW as one kernel for the device."""
    return device.type in ("cpu", "cuda")


def _spread(times: list[float]) -> float:
    return 100 * (max(times) - min(times)) / statistics.median(times)


def _timed(run: Callable[[], None], loops: int, device: torch.device) -> float:
    distributed.synchronize(device)
    started = time.perf_counter()
    for _ in range(loops):
        run()
    distributed.synchronize(device)
    return time.perf_counter() - started


def matrix_rate(precision: Precision, seconds: float = 0.25) -> float:
    """Measure plain matrix products of the precision on the device, in GMAC/s: the best of repeats in `seconds`."""
    n = 1024 if precision.device.type == "cpu" else 8192
    a, b, out = (torch.ones(n, n, dtype=precision.dtype, device=precision.device) for _ in range(3))
    return n**3 / 1e9 / _best_time(lambda: torch.mm(a, b, out=out), seconds, precision.device)


def copy_rate(device: torch.device, seconds: float = 0.25) -> float:
    """Measure copies within the device's memory, in GB/s read and written: the best of repeats in `seconds`."""
    a = torch.ones((64 if device.type == "cpu" else 1024) << 20, dtype=torch.uint8, device=device)
    b = a.clone()
    return 2 * len(a) / 1e9 / _best_time(lambda: b.copy_(a), seconds, device)


def _best_time(run: Callable[[], object], seconds: float, device: torch.device) -> float:
    _timed(run, 1, device)
    best, started = math.inf, time.perf_counter()
    while time.perf_counter() - started < seconds or best == math.inf:
        best = min(best, _timed(run, 1, device))
    return best


def count_macs(model: nn.Module, input_size: tuple[int, int]) -> float:
    """Count the GMACs (1 MAC = 2 FLOPs) of one image of `input_size` (height, width) in evaluation, by torchprofile.

    Warns where torch's own counter differs by more than 3 %: one of them does not know an operation of the model.
    """
    plain = copy.deepcopy(model).cpu().float().eval()
    image = torch.zeros(1, getattr(model, "in_chans", 3), *input_size)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch's tracer, which torchprofile uses
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "No handlers found")  # of what has no products; the other counter tells
        gmacs = profile_macs(plain, image) / 1e9
    other = count_macs_on_meta(plain, input_size)
    if other is not None and abs(other - gmacs) > 0.03 * max(gmacs, other):
        warnings.warn(f"{gmacs:.3f} GMACs by torchprofile, {other:.3f} by torch's flop counter", stacklevel=2)
    return gmacs


def count_macs_on_meta(model: nn.Module, input_size: tuple[int, int]) -> float | None:
    """Count GMACs of one image by torch's flop counter, products alone; None for a model that needs real numbers.

    On the meta device, since on the CPU that counter does not see fused attention.
    """
    model = copy.deepcopy(model).to("meta").eval()
    image = torch.zeros(1, getattr(model, "in_chans", 3), *input_size, device="meta")
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            model(image)
    except (RuntimeError, NotImplementedError, TypeError, AssertionError):  # the last: the counter's own, of CaiT
        return None
    return counter.get_total_flops() / 2e9


def benchmark_loaders(loaders: dict[str, DataLoader], turns: int = 5) -> dict[str, dict[str, float]]:
    """Time training loaders in turns of an epoch each, so that what disturbs the machine disturbs all.

    Returns of each: images_per_s (median), spread (percent, largest to smallest around the median) and the ratio of its
    images/s to the first loader's in the same turn (median), with its quartiles (ratio_q1, ratio_q3). One more turn
    goes before, and is not counted.
    """
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(turns + 1):
        for name, loader in loaders.items():
            loader.sampler.set_epoch(turn)
            started, images = time.perf_counter(), 0
            for _, targets in loader:
                images += len(targets)
            rates[name].append(images / (time.perf_counter() - started))
    found, first = {}, next(iter(rates.values()))[1:]
    for name, (_, *counted) in rates.items():
        median = statistics.median(counted)
        ratios = [ours / theirs for ours, theirs in zip(counted, first, strict=True)]
        q1, ratio, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
        found[name] = {
            "images_per_s": median,
            "spread": 100 * (max(counted) - min(counted)) / median,
            "ratio": ratio,
            "ratio_q1": q1,
            "ratio_q3": q3,
        }
    return found
