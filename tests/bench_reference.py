"""Compare DHVT with its plain reference (plain_dhvt.py) and DeiT, in turns: python -m tests.bench_reference.

For each model, inference (norm layers folded) and training steps: images/s of each way to compute it, the ratio of the
reference's time to it with quartiles, the share of the matrix rate, the peak memory. The reference is the plain model:
on a GPU eager under fp16 autocast, as the published script runs it, on a CPU in float32. Before that, what does not
depend on speed: the bytes that autograd keeps, and the largest difference of outputs and gradients. With --attention
instead: whole models with torch's fused attention and with two products and a softmax. Nothing is asserted here:
test_fast_paths.py does that.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils.benchmark import timer

import engine
import models
from tests.plain_dhvt import PlainDHVT
from util import distributed
from util.precision import Precision

assert models.dhvt  # registers the models

# model: batch sizes on a CPU and on a GPU; patch size, C, h and classes of the reference; DeiT of like MACs
CASES = {
    "dhvt_tiny_imagenet_patch16": (32, 256, (16, 192, 3, 1000), "deit_tiny_patch16_224"),
    "dhvt_tiny_cifar_patch4": (128, 512, (4, 192, 4, 100), "deit_tiny_patch16_224"),
    "dhvt_small_imagenet_patch16": (32, 256, (16, 384, 6, 1000), "deit_small_patch16_224"),
    "dhvt_small_cifar_patch4": (128, 512, (4, 384, 8, 100), "deit_small_patch16_224"),
}


def build_pair(name: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Return a model without drop path, and the reference with the same weights."""
    torch.manual_seed(0)
    ours = timm.create_model(name, drop_path_rate=0.0)
    plain = PlainDHVT(*CASES[name][2])
    plain.load_state_dict(ours.state_dict(), strict=True)
    return ours.to(device), plain.to(device)


@contextmanager
def saved_bytes() -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd keeps for the backward pass: each storage once, parameters not."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not tensor.is_leaf:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        # the tensor itself would keep its graph, which keeps it, for ever
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storages.values())


def count_saved(model: nn.Module, images: Tensor, precision: Precision) -> int:
    """Return how many bytes a training step of the model keeps, the images themselves not counted."""
    model.train()
    targets = torch.zeros(len(images), dtype=torch.long, device=images.device)
    with saved_bytes() as count:
        with precision.autocast():
            outputs = model(images)
        loss = F.cross_entropy(outputs.float(), targets)
        # read while the loss holds the graph
        return count() if loss.requires_grad else 0


def largest_difference(ours: nn.Module, plain: nn.Module, images: Tensor) -> tuple[float, float]:
    """Return the largest differences of outputs (norm layers folded) and gradients in float32, relative to their scale.

    The gradients' scale is the largest of all: those of biases before a norm layer are nothing but rounding.
    """
    with torch.no_grad():
        folded = reparameterize_model(ours.eval())
        expected = plain.eval()(images)
        outputs = ((folded(images) - expected).abs().max() / expected.abs().max()).item()
    targets = torch.arange(len(images), device=images.device) % 7
    gradients = []
    for model in (ours, plain):
        model.train().zero_grad()
        F.cross_entropy(model(images), targets).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    ours_gradients, plain_gradients = gradients
    scale = max(g.abs().max().item() for g in plain_gradients.values())
    worst = max((g - plain_gradients[name]).abs().max().item() for name, g in ours_gradients.items())
    return outputs, worst / scale


def compare_numbers(name: str, device: torch.device) -> dict[str, float]:
    """Print and return what does not depend on the machine's speed."""
    ours, plain = build_pair(name, device)
    images = torch.randn(8, 3, *timm.get_pretrained_cfg(name).input_size[-2:], device=device)
    outputs, gradients = largest_difference(ours, plain, images)
    kept = count_saved(ours, images, Precision(device)) / count_saved(plain, images, Precision(device))
    print(f"{name}: outputs differ by {outputs:.1g}, gradients by {gradients:.1g} of their scale; ", end="")
    print(f"autograd keeps {kept:.2f} of the reference's bytes", flush=True)
    return {"outputs": outputs, "gradients": gradients, "saved_bytes": kept}


def take_turns(steps: dict[str, Callable], pairs: int) -> dict[str, list[float]]:
    """Return the seconds of each step in `pairs` turns, after two turns that warm up."""
    turns = [[timeit.timeit(step, timer=timer, number=1) for step in steps.values()] for _ in range(2 + pairs)]
    return dict(zip(steps, map(list, zip(*turns[2:], strict=True)), strict=True))


def list_ways(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, tuple]:
    """Return the ways to compute a model, the reference first: (model, precision, compiled) by label."""
    ours, plain = build_pair(name, device)
    patch_size, _, heads, classes = CASES[name][2]
    size = timm.get_pretrained_cfg(name).input_size[-1]
    deit = timm.create_model(CASES[name][3], img_size=size, patch_size=patch_size, num_heads=heads, num_classes=classes)
    float32, bf16 = Precision(device), Precision(device, torch.bfloat16)
    if device.type == "cuda":
        channels_last = Precision(device, torch.bfloat16, channels_last=True)
        return {
            "plain, fp16": (plain, Precision(device, torch.float16), False),
            "ours, bf16": (ours, bf16, False),
            "ours, bf16, channels-last": (ours, channels_last, False),
            "ours, bf16, compiled": (ours, bf16, True),
            "ours, bf16, channels-last, compiled": (ours, channels_last, True),
            "DeiT, bf16": (deit, bf16, False),
        }
    models = {"plain": plain, "ours": ours, "DeiT": deit}
    ways = {f"{label}, float32": (model, float32, False) for label, model in models.items()}
    if args.bf16 or distributed.supports_bf16(device):
        ways |= {f"{label}, bf16": (model, bf16, False) for label, model in models.items()}
    if args.compile:
        ways |= {f"{label}, compiled": (model, how, True) for label, (model, how, _) in ways.items() if "ours" in label}
    return ways


def make_measured_step(device: torch.device, **kwargs) -> tuple[Callable[[], None], float]:
    """Return engine.make_step's function, and the MiB of the device that it takes at its peak, weights included."""
    before = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    step = engine.make_step(**kwargs)
    # compiling, choosing algorithms and making the optimizer's state take memory of their own
    step()
    distributed.reset_peak_memory(device)
    step()
    return step, distributed.peak_memory_mib(device) - before


def compare(name: str, mode: str, args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Yield a row for each way to compute a model."""
    batch_size = args.batch_size or CASES[name][device.type == "cuda"]
    size = timm.get_pretrained_cfg(name).input_size[-2:]
    train = mode == "train"
    ways = list_ways(name, args, device)
    measured = {
        label: make_measured_step(
            device,
            model=model,
            input_size=size,
            batch_size=batch_size,
            precision=precision,
            train=train,
            compile_mode="default" if compiled else None,
        )
        for label, (model, precision, compiled) in ways.items()
    }
    steps = {label: step for label, (step, _) in measured.items()}
    rates = {precision.dtype: engine.matrix_rate(precision, 0.25) for _, precision, _ in ways.values()}
    seconds = take_turns(steps, args.pairs)
    reference, *_ = seconds.values()
    # once per model, of which there are several ways
    count_macs = functools.cache(functools.partial(engine.count_macs, input_size=size))
    for label, (model, precision, _) in ways.items():
        # of the ratios within a turn, since the machine's speed drifts from turn to turn
        ratios = [b / a for a, b in zip(seconds[label], reference, strict=True)]
        q1, ratio, q3 = statistics.quantiles(ratios, method="inclusive")
        images_per_s = batch_size / statistics.median(seconds[label])
        gmacs = count_macs(model)
        work = gmacs * (engine.TRAIN_STEP_MACS if train else 1)
        yield {
            "model": name,
            "mode": mode,
            "batch": batch_size,
            "way": label,
            "images_per_s": images_per_s,
            "gmacs": gmacs,
            "gmacs_per_s": images_per_s * gmacs,
            "ratio": ratio,
            "ratio_q1": q1,
            "ratio_q3": q3,
            "share": 100 * images_per_s * work / rates[precision.dtype],
            "peak_memory_mib": measured[label][1],
        }


def compare_attention(args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Yield a row per model, precision, number of tokens and mode: the time of plain attention over that of fused."""

    @dataclass
    class Fused(Precision):
        fused_attn: bool = True

    names = ["dhvt_tiny_imagenet_patch16", "deit_tiny_patch16_224", "deit_tiny_patch16_shrink_base"]
    dtypes = [None, torch.bfloat16] if args.bf16 or distributed.supports_bf16(device) else [None]
    sizes = {128: 64, 224: 32, 384: 8}
    for dtype, (size, batch_size), name, mode in product(dtypes, sizes.items(), names, args.mode):
        model = timm.create_model(name, img_size=size)
        batch_size = args.batch_size or batch_size
        how = {"batch_size": batch_size, "train": mode == "train", "compile_mode": None}
        fused, plain = (
            engine.make_step(model, (size, size), precision=Fused(device, dtype, fused_attn=fused), **how)
            for fused in (True, False)
        )
        row = engine.compare_steps(fused, plain, batch_size, args.pairs)
        tokens = model.patch_embed.num_patches + 1
        precision = str(dtype or torch.float32).removeprefix("torch.")
        yield {"model": name, "precision": precision, "tokens": tokens, "mode": mode, "batch": batch_size, **row}


def print_row(row: dict, first: bool) -> None:
    """Print a row of a Markdown table, after the head of the table."""
    cells = {key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()}
    if first:
        print(f"\n| {' | '.join(cells)} |\n{'|---' * len(cells)}|")
    print(f"| {' | '.join(cells.values())} |", flush=True)


def write_json(path: str | None, differences: dict, rows: list[dict]) -> None:
    if path:
        Path(path).write_text(json.dumps({"differences": differences, "rows": rows}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_reference", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--mode", nargs="+", default=["train", "inference"], choices=["inference", "train"])
    parser.add_argument("--attention", action="store_true", help="compare fused and plain attention instead")
    parser.add_argument(
        "--batch-size", type=int, default=None, help="default: 32 at 224 px, 128 at 32 px; GPU: 256, 512"
    )
    parser.add_argument("--pairs", type=int, default=11, help="number of turns")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no model after so long")
    parser.add_argument("--device", default=None)
    parser.add_argument("--bf16", action="store_true", help="bf16 also on a CPU that has to emulate it")
    parser.add_argument("--compile", action="store_true", help="ours compiled too, on a CPU; on a GPU it always is")
    parser.add_argument("--json", default=None, metavar="FILE")
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error("--pairs: at least 2, for quartiles")
    started = time.monotonic()
    device = distributed.pick_device(args.device)
    preload = os.environ.get("LD_PRELOAD", "none")
    print(f"{distributed.describe(device)}, torch {torch.__version__}, timm {timm.__version__}, LD_PRELOAD {preload}")
    differences = {}
    rows = []

    if args.attention:
        for row in compare_attention(args, device):
            print_row(row, not rows)
            rows.append(row)
    else:
        for name in args.model:
            differences[name] = compare_numbers(name, device)
        for name, mode in product(args.model, args.mode):
            if time.monotonic() - started > 60 * args.minutes:
                print(f"{name}, {mode}: not measured, --minutes {args.minutes:g} are over")
                continue
            for row in compare(name, mode, args, device):
                print_row(row, not rows)
                rows.append(row)
            torch._dynamo.reset()
            # what is done outlasts a time limit
            write_json(args.json, differences, rows)
    write_json(args.json, differences, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
