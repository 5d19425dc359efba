"""Export a trained model: safetensors as timm and the Hugging Face hub have it, and ONNX.

`python export.py --checkpoint output/mine/best_checkpoint.pth --out exported` writes a folder that predict.py and
`timm.create_model("local-dir:exported", pretrained=True)` load. With --onnx it also holds model.onnx; --push uploads
it, with the token of `hf auth login`.
"""

import json
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import get_session
from safetensors import SafetensorError
from timm.models import save_for_hf
from timm.utils import reparameterize_model

from card import write_card
from models.build import TrainedModel, load_trained
from util.command import REQUIRED, Parser, add_flags, add_model_flags, run_command
from util.errors import InputError, first_line
from util.log import RunLog
from util.options import model_overrides

FLAGS = (
    ("--out", str, REQUIRED, "folder to write model.safetensors, config.json and README.md, the model card, to"),
    ("--onnx", bool, False, "also write model.onnx, verified with ONNX Runtime"),
    ("--overwrite", bool, False, "replace --out once the new folder is complete"),
    ("--push", str, None, "USER/NAME: upload --out to the Hugging Face Hub; a new repository is public"),
)


def write_safetensors(trained: TrainedModel, folder: Path) -> None:
    """Write model.safetensors and config.json as timm does, with the names of the classes."""
    config = trained.config
    save_for_hf(
        trained.model,
        folder,
        model_config={"label_names": trained.classes} if trained.classes else None,
        safe_serialization=True,
        data_config={
            "input_size": (3, *config.input_size),
            "crop_pct": config.crop_ratio,
            "crop_mode": config.crop_mode,
            "interpolation": config.interpolation,
            "mean": config.mean,
            "std": config.std,
        },
    )
    # safetensors lets only the owner read its files
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def write_onnx(trained: TrainedModel, path: Path) -> None:
    """Write a graph of normalized images [batch, 3, height, width] -> logits [batch, classes], and verify it.

    Norm layers are folded into convolutions. Raises InputError if torch cannot export the model, or if ONNX Runtime
    computes other logits than PyTorch.
    """
    try:
        import onnxruntime

        # torch's exporter needs it
        import_module("onnxscript")
    except ImportError as error:
        raise InputError(f"--onnx needs {error.name}: pip install -r requirements-extra.txt") from None

    images = torch.randn(3, 3, *trained.config.input_size)
    expected = trained.model(images).detach()  # 3, classes

    # the exporter warns of its own internals
    with warnings.catch_warnings(action="ignore"):
        try:
            program = torch.onnx.export(
                reparameterize_model(trained.model),
                (images[:2],),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: "batch"},),
                verbose=False,
            )
        except Exception as error:
            # it fails in many ways; safetensors do not need it
            raise InputError(f"--onnx: torch cannot export this model ({first_line(error)}); leave it out") from None

    # the file says how images are prepared, and what the logits stand for
    properties = {**asdict(trained.config), "classes": trained.classes}
    for name, value in properties.items():
        program.model.metadata_props[name] = json.dumps(value)
    program.save(path)

    # verify it against the norm layers as they were, at another batch size than it was exported at
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    difference = (torch.from_numpy(logits) - expected).abs().max() / expected.abs().max()
    # NaN is not within the tolerance either
    if not difference <= 1e-4:
        raise InputError(f"--onnx: ONNX Runtime's logits differ by {difference:.1e} of PyTorch's largest; leave it out")
    print(f"ONNX Runtime's logits differ by {difference:.1e} of PyTorch's largest")


def push(folder: Path, repository: str) -> None:
    """Upload a folder to the Hugging Face Hub, or to the server that HF_ENDPOINT names. Raises InputError."""
    # seconds of silence; the library would wait forever
    get_session().timeout = 60
    try:
        url = HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:
        # of any kind: names, logins, connections and servers fail in many ways
        raise InputError(
            f"--push {repository}: {first_line(error)}; {folder} is complete: upload it with `hf auth login` and "
            f"`hf upload {repository} {folder}`"
        ) from None
    print(f"uploaded to {url}")


def run(argv: list[str]) -> None:
    parser = Parser(prog="export.py", description=__doc__)
    add_flags(parser, FLAGS)
    add_model_flags(parser)
    args = parser.parse_args(argv)
    # without a user the hub would take whoever is logged in
    if args.push and args.push.count("/") != 1:
        raise InputError(f"--push {args.push}: must be USER/NAME")
    out = Path(args.out)
    if out.exists():
        if not args.overwrite:
            raise InputError(f"--out {out}: exists already; add --overwrite, or name another folder")
        # nothing but an exported model, or an empty folder, is replaced
        if any(out.iterdir()) and not (out / "config.json").is_file():
            raise InputError(f"--out {out}: holds something other than an exported model; name another folder")
    overrides = model_overrides(args)
    trained = load_trained(args.checkpoint, use_ema=args.use_ema, **overrides)
    # the accuracies in log.txt are those of the model as it was trained
    epochs = [] if overrides else RunLog(Path(trained.source).parent).read()

    # write to a temporary folder beside --out, and rename it once it is complete
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            folder = Path(temporary, "new")
            write_safetensors(trained, folder)
            write_card(trained, epochs, folder / "README.md", args.use_ema, args.push or "USER/NAME")
            if args.onnx:
                write_onnx(trained, folder / "model.onnx")
            if out.exists():
                # it is deleted with the temporary folder
                out.rename(Path(temporary, "old"))
            folder.rename(out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--out {out}: {first_line(error)}") from None

    for path in sorted(out.iterdir()):
        print(f"{path}  {path.stat().st_size:,} bytes")
    registers = getattr(args, "import") or "this repository's models"
    print(f'load it with timm.create_model("local-dir:{out}", pretrained=True) after importing {registers}')
    if args.push:
        push(out, args.push)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("export.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
