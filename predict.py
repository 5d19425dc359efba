"""Classify images: python predict.py PATH… --checkpoint FILE|FOLDER."""

import csv
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import chain
from typing import TextIO

import torch
from PIL import Image
from timm.utils import reparameterize_model
from torch import Tensor
from torch.utils.data import DataLoader

from data.images import ImageFiles, find_images
from data.transforms import build_transform
from datasets import default_workers
from models.build import load_trained
from util.command import (
    Parser,
    add_flags,
    add_model_flags,
    nonnegative_int,
    positive_int,
    run_command,
)
from util.distributed import pick_device
from util.errors import InputError, printable
from util.options import model_overrides
from util.precision import AMP_FLAG, DTYPES, Precision, resolve_amp
from util.stop_signal import ignore_signals

FLAGS = (
    ("--topk", positive_int, 5, "number of classes per image"),
    ("--json", bool, False, "print one JSON list instead of a line per image"),
    ("--csv", str, None, "also write a table to this file"),
    ("--batch-size", positive_int, 32, "images per batch"),
    ("--num_workers", nonnegative_int, None, "processes that read images; default: this process's cores, at most 10"),
    ("--device", str, None, "for example cuda, cuda:1 or cpu; default: the best there is"),
    AMP_FLAG,
)


class CheckedImages(ImageFiles):
    """Pairs of an image [3, H, W] and "", or of a black image and why the file cannot be read."""

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return super().__getitem__(index)[0], ""
        except InputError as error:
            # one bad file does not end the run, and its place in the batch is kept
            return self.transform(Image.new("RGB", (1, 1))), str(error)


def write_csv(file: TextIO, rows: Sequence[dict]) -> None:
    """Write rows of the JSON as a table, with three columns for each of the best classes, and close the file."""
    table = []
    for row in rows:
        line = {"path": row["path"], "error": row.get("error")}
        for k, prediction in enumerate(row.get("predictions", ()), start=1):
            line |= {f"{name}_{k}": value for name, value in prediction.items()}
        table.append(line)
    with file:
        writer = csv.DictWriter(file, dict.fromkeys(chain(*table)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def run(argv: list[str]) -> None:
    parser = Parser(prog="predict.py", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images, and folders of images")
    add_flags(parser, FLAGS)
    add_model_flags(parser)
    args = parser.parse_args(argv)

    device = pick_device(args.device)
    files = [file for path in args.paths for file in find_images(path)]

    # notes on the checkpoint are not part of the JSON on stdout
    with redirect_stdout(sys.stderr):
        trained = load_trained(args.checkpoint, use_ema=args.use_ema, **model_overrides(args))
        precision = Precision(device, DTYPES[resolve_amp(args.amp, device)])
    # fold the norm layers into the convolutions
    model = precision.place(reparameterize_model(trained.model))

    workers = default_workers() if args.num_workers is None else args.num_workers
    loader = DataLoader(
        CheckedImages(files, None, [], build_transform(False, trained.config)),
        args.batch_size,
        # starting a process takes longer than reading a batch
        num_workers=min(workers, len(files) // args.batch_size),
        # Ctrl-C is for the main process
        worker_init_fn=ignore_signals,
    )
    # a head may have more outputs than there are names
    names = dict(enumerate(trained.classes or ()))
    # open it before predicting, so that a bad path fails at once
    table = open(args.csv, "w", newline="", encoding="utf-8", errors="surrogateescape") if args.csv else None
    # rows of the JSON, in the order of the files
    rows = []
    for images, errors in loader:
        with torch.inference_mode(), precision.autocast():
            probabilities = model(images.to(device)).float().softmax(dim=1).tolist()  # B, classes

        # a line per image, as soon as it is known
        for error, row in zip(errors, probabilities, strict=True):
            path = files[len(rows)]
            if error:
                rows.append({"path": path, "error": error})
                print(f"predict.py: {error}", file=sys.stderr)
                continue
            best = sorted(enumerate(row), key=lambda pair: -pair[1])[: args.topk]
            predictions = [{"class": names.get(i, f"{i}"), "index": i, "probability": p} for i, p in best]
            rows.append({"path": path, "predictions": predictions})
            if not args.json:
                words = [f"{p['class']} {p['probability']:.1%}" for p in predictions]
                # names of files need not be UTF-8
                print(printable(path), *words, sep="  ", flush=True)

    # the error comes last, after all that could be read
    if args.json:
        print(json.dumps(rows, indent=1))
    if table:
        write_csv(table, rows)
    unreadable = sum("error" in row for row in rows)
    if unreadable:
        raise InputError(f"{unreadable} of {len(files)} files could not be read; they are named above")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("predict.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
