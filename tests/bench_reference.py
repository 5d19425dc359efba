"""Compare DHVT with its plain reference (plain_dhvt.py), in turns in one run: python -m tests.bench_reference.

For each model: inference (norms folded) and training steps as ratios of the reference's time to ours, with quartiles;
the bytes that autograd keeps for the backward pass; the largest difference of outputs and gradients. On a GPU the
reference runs eagerly under fp16 autocast, as the published script does, and the peak memory and the shares of what
the device's matrix products and copies reach are measured too. Nothing is asserted here: test_fast_paths.py does that.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from tests.plain_dhvt import PlainDHVT
from util import distributed, measure
from util.precision import Precision

assert models.dhvt  # registers the models

CASES = {  # model: batch; patch, C, h, classes of the reference
    "dhvt_tiny_imagenet_patch16": (32, (16, 192, 3, 1000)),
    "dhvt_small_imagenet_patch16": (32, (16, 384, 6, 1000)),
    "dhvt_tiny_cifar_patch4": (128, (4, 192, 4, 100)),
    "dhvt_small_cifar_patch4": (128, (4, 384, 8, 100)),
}


def build_pair(name: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Build a model without drop path, and the reference with the same weights."""
    torch.manual_seed(0)
    ours, plain = timm.create_model(name, drop_path_rate=0.0), PlainDHVT(*CASES[name][1])
    plain.load_state_dict(ours.state_dict(), strict=True)
    return ours.to(device), plain.to(device)


@contextmanager
def saved_bytes() -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd keeps for the backward pass: each storage once, parameters not."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not tensor.is_leaf:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would keep its graph, which keeps it, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storages.values())


def count_saved(model: nn.Module, images: Tensor, precision: Precision) -> int:
    """Count what a training step of the model keeps, the images themselves not."""
    model.train()
    with saved_bytes() as count:
        with precision.autocast():
            outputs = model(images)
        loss = F.cross_entropy(outputs.float(), torch.zeros(len(images), dtype=torch.long, device=images.device))
        return count() if loss.requires_grad else 0


def largest_difference(ours: nn.Module, plain: nn.Module, images: Tensor) -> tuple[float, float]:
    """Give the largest difference of outputs (norms folded) and of gradients, in float32, as parts of their scale.

    The gradients' scale is the largest of all: biases before a norm have none of their own but rounding.
    """
    with torch.no_grad(), measure.folded(ours.eval()):
        expected = plain.eval()(images)
        outputs = ((ours(images) - expected).abs().max() / expected.abs().max()).item()
    gradients = []
    for model in (ours, plain):
        model.train().zero_grad(set_to_none=True)
        F.cross_entropy(model(images), torch.arange(len(images), device=images.device) % 7).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    scale = max(g.abs().max().item() for g in gradients[1].values())
    worst = max((g - gradients[1][name]).abs().max().item() / scale for name, g in gradients[0].items())
    return outputs, worst


class Traffic(TorchDispatchMode):
    """Count the bytes that operations read and write, views not: what an eager run moves at least."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def compare(name: str, args: argparse.Namespace, device: torch.device) -> dict:
    batch, size = args.batch_size or CASES[name][0], timm.get_pretrained_cfg(name).input_size[-1]
    ours, plain = build_pair(name, device)
    images = torch.randn(batch, 3, size, size, device=device)
    reference = Precision(device, torch.float16 if device.type == "cuda" else None)
    best = Precision(device, torch.bfloat16 if device.type == "cuda" else None, args.channels_last)
    found: dict = {"model": name, "batch": batch, "compiled": args.compile, "precision": str(best)}
    found["output_difference"], found["gradient_difference"] = largest_difference(ours, plain, images[:8])
    kept = [count_saved(m, images, p) for m, p in ((ours, best), (plain, reference))]
    found["saved_bytes"] = {"ours_mib": kept[0] / 2**20, "plain_mib": kept[1] / 2**20, "ratio": kept[0] / kept[1]}
    gmacs, rate = measure.count_macs(ours, (size, size)), measure.matrix_rate(best)
    found["matrix_gmacs_per_s"], found["copy_gb_per_s"] = rate, measure.copy_rate(device)
    for mode in args.mode:
        train = mode == "train"
        run = measure.make_step(ours, best.lay_out(images), best, train, args.compile)
        other = measure.make_step(plain, images, reference, train)
        row = measure.compare_steps(run, other, batch, device, args.pairs)
        row["share"] = 100 * gmacs * (measure.BACKWARD if train else 1) * row["images_per_s"] / rate
        row["plain_share"] = 100 * gmacs * (measure.BACKWARD if train else 1) * row["baseline_images_per_s"] / rate
        if not train:
            with torch.inference_mode(), measure.folded(ours.eval()), best.autocast(), Traffic() as traffic:
                ours(best.lay_out(images))
            moved = traffic.bytes * row["images_per_s"] / batch / 1e9
            row["share_of_copy"] = 100 * moved / found["copy_gb_per_s"]  # as if nothing were fused
        if device.type == "cuda":
            row["peak_memory_ratio"] = peak(run, device) / peak(other, device)
        found[mode] = row
    return found


def peak(step: Callable[[], None], device: torch.device) -> float:
    distributed.reset_peak_memory(device)
    step()
    return distributed.peak_memory_mib(device)


def describe(found: dict) -> str:
    lines = [f"{found['model']}, batch {found['batch']}, {found['precision']}{', compiled' * found['compiled']}"]
    for mode in ("inference", "train"):
        if mode in found:
            row = found[mode]
            lines.append(
                f"  {mode:<10} {row['ratio']:.3f} times (quartiles {row['ratio_q1']:.3f} to {row['ratio_q3']:.3f}), "
                f"{row['images_per_s']:.1f} and {row['baseline_images_per_s']:.1f} images/s, {row['share']:.0f} and "
                f"{row['plain_share']:.0f} % of {found['matrix_gmacs_per_s']:.0f} GMAC/s in matrix products"
                + (f"; unfused, {row['share_of_copy']:.0f} % of copies" if "share_of_copy" in row else "")
                + (f"; peak memory {row['peak_memory_ratio']:.3f}" if "peak_memory_ratio" in row else "")
            )
    kept = found["saved_bytes"]
    lines.append(
        f"  kept for backward, eager: {kept['ours_mib']:.0f} of {kept['plain_mib']:.0f} MiB, {kept['ratio']:.3f}"
    )
    lines.append(
        f"  differences: outputs {found['output_difference']:.1e}, gradients {found['gradient_difference']:.1e}"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_reference", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--mode", nargs="+", default=["inference", "train"], choices=["inference", "train"])
    parser.add_argument("--batch-size", type=int, default=None, help="default: 32 at 224 px, 128 at 32 px")
    parser.add_argument("--pairs", type=int, default=11, help="turns")
    parser.add_argument("--device", default=None)
    parser.add_argument("--compile", action="store_true", help="ours compiled; the reference stays eager")
    parser.add_argument("--channels-last", action="store_true", help="images of ours channels-last")
    parser.add_argument("--json", default=None, metavar="FILE")
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error("--pairs: two at least, for quartiles")
    device = distributed.pick_device(args.device)
    print(f"{distributed.describe(device)}, torch {torch.__version__}, timm {timm.__version__}", flush=True)
    rows = []
    for name in args.model:
        rows.append(compare(name, args, device))
        print(describe(rows[-1]), flush=True)
        torch._dynamo.reset()
    middle = statistics.median(row[mode]["ratio"] for row in rows for mode in args.mode)
    print(f"median of all {len(rows) * len(args.mode)} ratios {middle:.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
