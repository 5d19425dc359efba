"""Write a trained model in others' formats: safetensors as timm and the Hugging Face hub have it, and ONNX.

`python export.py --checkpoint output/mine/best_checkpoint.pth --out exported` makes a folder that
`timm.create_model("local-dir:exported", pretrained=True)` loads, and predict.py; with --onnx, model.onnx is in it too.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf

import trained
from util.errors import InputError
from util.measure import folded
from util.parser import Parser

TOLERANCE = 1e-4  # of the largest logit


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit status: 0, or 2 for what the caller can mend."""
    try:
        run(build_parser().parse_args(sys.argv[1:] if argv is None else list(argv)))
    except InputError as error:
        print(f"export.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        print(f"export.py: error: {error.filename or '--out'}: {error.strerror}", file=sys.stderr, flush=True)
        return 2
    return 0


def build_parser() -> Parser:
    parser = Parser(prog="export.py", description=__doc__.partition("\n")[0])
    trained.add_flags(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="made, with model.safetensors and config.json")
    parser.add_argument("--onnx", action="store_true", help="model.onnx too, which ONNX Runtime has computed alike")
    parser.add_argument("--overwrite", action="store_true", help="replace --out, once the new one is complete")
    return parser


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.exists() and not (args.overwrite and out.is_dir()):
        raise InputError(f"--out {out}: is there already; add --overwrite, or name another folder")
    if args.overwrite and out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise InputError(f"--out {out}: holds other things than an exported model; name another folder")
    if args.onnx:
        import_onnx()
    found = trained.load(args)
    unfinished = out.absolute().with_name(f".{out.absolute().name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write_safetensors(found, unfinished)
        if args.onnx:
            write_onnx(found, unfinished / "model.onnx")
        if out.exists():
            shutil.rmtree(out)
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for path in sorted(out.iterdir()):
        data = path.read_bytes()
        print(f"{path}  {len(data):,} bytes  sha256 {hashlib.sha256(data).hexdigest()}")
    print(f'timm.create_model("local-dir:{out}", pretrained=True) loads it, after `import models` of this repository')


def write_safetensors(found: trained.Trained, folder: Path) -> None:
    """Write model.safetensors and config.json."""
    config = {"label_names": found.classes} if found.classes else {}
    data = {"input_size": (3, *found.size), "crop_pct": found.crop_ratio, "interpolation": "bicubic"}
    data |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "crop_mode": "center"}
    save_for_hf(found.model, str(folder), config, safe_serialization=True, data_config=data)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # which others could not read


def import_onnx():
    """Give onnx and onnxruntime. Raises InputError where they, or the exporter's own need, are missing."""
    try:
        import onnx
        import onnxruntime

        if find_spec("onnxscript") is None:  # torch's exporter wants it
            raise ModuleNotFoundError(name="onnxscript")
    except ImportError as error:
        raise InputError(
            f"--onnx needs {error.name}, which is not installed: pip install -r requirements-extra.txt"
        ) from None
    return onnx, onnxruntime


def write_onnx(found: trained.Trained, path: Path) -> None:
    """Write a graph of normalised images [batch, 3, height, width] to logits [batch, classes], and check it.

    DHVT's norms are folded in it.

    Raises InputError where torch cannot export the model, or ONNX Runtime computes other logits.
    """
    onnx, onnxruntime = import_onnx()
    images = torch.randn(3, 3, *found.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = found.model(images)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), folded(found.model):
        warnings.simplefilter("ignore")  # the exporter's own, of its insides
        try:
            program = torch.onnx.export(
                found.model, (images[:2],), dynamo=True, input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
            )  # fmt: skip
        except (RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"--onnx: {found.name} cannot be exported ({str(error).splitlines()[0]})") from None
    graph = program.model_proto
    facts = {"input_size": found.size, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    facts |= {"crop_ratio": found.crop_ratio, "interpolation": "bicubic", "classes": found.classes}
    onnx.helper.set_model_props(graph, {k: json.dumps(v) for k, v in facts.items()})
    onnx.checker.check_model(graph)
    path.write_bytes(graph.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        (logits,) = session.run(None, {"images": images[:count].numpy()})
        difference = (torch.from_numpy(logits) - expected[:count]).abs().max() / expected.abs().max()
        if not difference <= TOLERANCE:
            raise InputError(f"--onnx: ONNX Runtime's logits differ by {difference:.1e} of their scale: leave it out")
        print(f"ONNX Runtime, batch {count}: logits differ by {difference:.1e} of their scale")


if __name__ == "__main__":
    sys.exit(main())
