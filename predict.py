"""Say what images show: python predict.py PATH… --checkpoint FILE|FOLDER."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

import trained
from builders import find_amp_dtype
from datasets import default_workers
from util import distributed
from util.distributed import print0
from util.errors import InputError
from util.images import load_rgb, read_file
from util.parser import Parser
from util.precision import Precision


class Files(Dataset):
    """Image files as the model's input [3, H, W], or what is wrong with them."""

    def __init__(self, paths: Sequence[Path], transform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Path, torch.Tensor | str]:
        path = self.paths[index]
        try:
            return path, self.transform(load_rgb(read_file(str(path)), str(path)))
        except InputError as error:
            return path, str(error)


def find_images(words: Sequence[str]) -> list[Path]:
    """List the files that are named, and the images in folders and those below them. Raises InputError."""
    found = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
            if not below:
                raise InputError(f"{path}: no images in it (looked for {', '.join(IMG_EXTENSIONS)})")
            found += below
        elif path.exists():
            found.append(path)
        else:
            raise InputError(f"{path}: no such file or folder")
    return found


@torch.inference_mode()
def predict(
    found: trained.Trained, paths: Sequence[Path], precision: Precision, args: argparse.Namespace
) -> Iterator[tuple[Path, list[dict[str, Any]] | str]]:
    """Yield of each path, in order, the best classes, or what is wrong with it."""
    model = found.model.to(precision.device)
    workers = default_workers() if args.num_workers is None else args.num_workers
    workers = 0 if len(paths) <= args.batch_size else workers  # a process takes longer to start than they to read
    loader = DataLoader(Files(paths, found.transform), args.batch_size, num_workers=workers, collate_fn=list)
    for batch in loader:
        images = [image for _, image in batch if isinstance(image, torch.Tensor)]
        if images:
            with precision.autocast():
                logits = iter(model(torch.stack(images).to(precision.device)).float().cpu())
        for path, image in batch:
            yield path, image if isinstance(image, str) else trained.pick(next(logits), found.classes, args.topk)


def run(args: argparse.Namespace) -> int:
    for name in ("topk", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.num_workers is not None and args.num_workers < 0:
        raise InputError(f"--num_workers {args.num_workers} must be 0 or more")
    device = distributed.pick_device(args.device)
    precision = Precision(device, find_amp_dtype(args.amp, device))
    paths = find_images(args.paths)
    found = trained.load(args)
    rows, bad = [], 0
    for path, result in predict(found, paths, precision, args):
        if isinstance(result, str):
            bad += 1
            rows.append({"path": str(path), "error": result})
            print(f"predict.py: {result}", file=sys.stderr, flush=True)
        elif args.json:
            rows.append({"path": str(path), "predictions": result})
        else:
            print0("".join([str(path), *(f"  {r['class']} {r['probability']:.1%}" for r in result)]))
    if args.json:
        print0(json.dumps(rows, indent=1))
    if bad:
        raise InputError(f"{bad} of {len(paths)} files could not be read, and are named above")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit status: 0, or 2 for what the caller can mend, a single image too."""
    parser = Parser(prog="predict.py", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images, and folders of them")
    trained.add_flags(parser)
    add = parser.add_argument
    add("--topk", type=int, default=5, help="classes an image")
    add("--json", action="store_true", help="print one list of objects")
    add("--batch-size", type=int, default=32)
    add("--num_workers", type=int, default=None)
    add("--device", default=None, help="default: the best there is")
    add("--amp", default="off", choices=("auto", "off", "fp16", "bf16"))
    try:
        return run(parser.parse_args(sys.argv[1:] if argv is None else list(argv)))
    except InputError as error:
        print(f"predict.py: error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
