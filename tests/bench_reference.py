"""Compare DHVT with its plain reference (plain_dhvt.py), in turns in one run: python -m tests.bench_reference.

For each model: inference (norm layers folded) and training steps as ratios of the reference's time to ours, with
quartiles; the bytes that autograd keeps for the backward pass; the largest difference of outputs and gradients. On a
GPU the reference runs eagerly under fp16 autocast, as the published script does, and the peak memory is compared too.
Nothing is asserted here: test_fast_paths.py does that.
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
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
import models
from tests.plain_dhvt import PlainDHVT
from util import distributed
from util.precision import Precision

assert models.dhvt  # registers the models

# model: batch size; patch size, C, h and classes of the reference
CASES = {
    "dhvt_tiny_imagenet_patch16": (32, (16, 192, 3, 1000)),
    "dhvt_small_imagenet_patch16": (32, (16, 384, 6, 1000)),
    "dhvt_tiny_cifar_patch4": (128, (4, 192, 4, 100)),
    "dhvt_small_cifar_patch4": (128, (4, 384, 8, 100)),
}


def build_pair(name: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Return a model without drop path, and the reference with the same weights."""
    torch.manual_seed(0)
    ours = timm.create_model(name, drop_path_rate=0.0)
    plain = PlainDHVT(*CASES[name][1])
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


class Traffic(TorchDispatchMode):
    """Count the bytes that operations read and write, except views: what an eager run moves at least."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def count_traffic(model: nn.Module, images: Tensor, precision: Precision) -> int:
    """Return the bytes that inference moves at least, with norm layers folded and nothing fused."""
    folded = reparameterize_model(model.eval())
    with torch.inference_mode(), precision.autocast(), Traffic() as traffic:
        folded(precision.to_memory_format(images))
    return traffic.bytes


def copy_rate(device: torch.device) -> float:
    """Return the best rate of copies within the device's memory, in GB/s read and written."""
    source = torch.ones((64 if device.type == "cpu" else 1024) << 20, dtype=torch.uint8, device=device)
    target = source.clone()
    measured = engine.make_timer(lambda: target.copy_(source)).blocked_autorange()
    return 2 * len(source) / 1e9 / min(measured.times)


def peak_memory(step: Callable[[], None], device: torch.device) -> float:
    distributed.reset_peak_memory(device)
    step()
    return distributed.peak_memory_mib(device)


def compare(name: str, args: argparse.Namespace, device: torch.device) -> dict:
    """Return all that is compared of one model, as it is written to --json."""
    batch_size = args.batch_size or CASES[name][0]
    size = timm.get_pretrained_cfg(name).input_size[-2:]
    ours, plain = build_pair(name, device)
    images = torch.randn(batch_size, 3, *size, device=device)
    on_gpu = device.type == "cuda"
    precision = Precision(device, torch.bfloat16 if on_gpu else None, args.channels_last)
    reference_precision = Precision(device, torch.float16 if on_gpu else None)

    # what does not depend on the machine's speed
    row: dict = {"model": name, "batch": batch_size, "compiled": args.compile, "precision": str(precision)}
    row["output_difference"], row["gradient_difference"] = largest_difference(ours, plain, images[:8])
    kept = count_saved(ours, images, precision)
    plain_kept = count_saved(plain, images, reference_precision)
    row["saved_bytes"] = {"ours_mib": kept / 2**20, "plain_mib": plain_kept / 2**20, "ratio": kept / plain_kept}

    # what the machine can do at best
    gmacs = engine.count_macs(ours, size)
    row["matrix_gmacs_per_s"] = engine.matrix_rate(precision, 0.25)
    row["copy_gb_per_s"] = copy_rate(device)

    for mode in args.mode:
        train = mode == "train"
        step = engine.make_step(ours, size, batch_size, precision, train, args.compile)
        plain_step = engine.make_step(plain, size, batch_size, reference_precision, train, False)
        result = engine.compare_steps(step, plain_step, batch_size, args.pairs)
        share = 100 * gmacs * (engine.TRAIN_STEP_MACS if train else 1) / row["matrix_gmacs_per_s"]
        result["share"] = share * result["images_per_s"]
        result["plain_share"] = share * result["baseline_images_per_s"]
        if not train:
            moved = count_traffic(ours, images, precision) * result["images_per_s"] / batch_size / 1e9
            result["share_of_copy"] = 100 * moved / row["copy_gb_per_s"]
        if on_gpu:
            result["peak_memory_ratio"] = peak_memory(step, device) / peak_memory(plain_step, device)
        row[mode] = result
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_reference", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--mode", nargs="+", default=["inference", "train"], choices=["inference", "train"])
    parser.add_argument("--batch-size", type=int, default=None, help="default: 32 at 224 px, 128 at 32 px")
    parser.add_argument("--pairs", type=int, default=11, help="number of turns")
    parser.add_argument("--device", default=None)
    parser.add_argument("--compile", action="store_true", help="ours compiled; the reference stays eager")
    parser.add_argument("--channels-last", action="store_true", help="images of ours channels-last")
    parser.add_argument("--json", default=None, metavar="FILE")
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error("--pairs: at least 2, for quartiles")
    device = distributed.pick_device(args.device)
    print(f"{distributed.describe(device)}, torch {torch.__version__}, timm {timm.__version__}", flush=True)
    rows = []
    for name in args.model:
        rows.append(compare(name, args, device))
        print(json.dumps(rows[-1], indent=1), flush=True)
        torch._dynamo.reset()
    middle = statistics.median(row[mode]["ratio"] for row in rows for mode in args.mode)
    print(f"median of all {len(rows) * len(args.mode)} ratios {middle:.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
