"""Checkpoints: written so that an interrupted save harms nothing, read without running what they hold."""

import argparse
import io
import os
import pathlib
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from util.errors import InputError

NUMBERED = re.compile(r"checkpoint_(\d+)(?:_(\d+))?\.pth")  # epoch, and updates made where it is not finished

LARGEST_DOWNLOAD = 16 << 30  # bytes

# Types that published checkpoints hold beside tensors: an argparse.Namespace with paths and NumPy numbers in it.
ALLOWED = [
    argparse.Namespace,
    pathlib.Path,
    pathlib.PurePath,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
    np._core.multiarray.scalar,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(t)) for t in (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_)),
]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, sync it, rename it: a reader sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _publish(source: Path, target: Path) -> None:
    """Give a finished file another name, atomically, without writing it twice where the file system has links."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # renaming onto another name of the same file leaves both


def save(state: dict[str, Any], folder: Path, keep: int, best: bool) -> None:
    """Write checkpoint.pth, `keep` numbered files of the last epochs (two or more), and best_checkpoint.pth.

    `state["epoch"]` is the last finished epoch, from 0; with a `state["position"]` the next has begun, and `keep` files
    of it are kept beside those of the epochs until it is finished. Files of later moments, left by a run that was
    resumed from an earlier one, are removed once this one is safe.
    """
    now = state["epoch"] + 1, (state.get("position") or {}).get("update", 0)
    fresh = folder / ".checkpoint.new"
    try:
        with open(fresh, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if keep > 1:
            _publish(fresh, folder / _number(*now))
        if best:
            _publish(fresh, folder / "best_checkpoint.pth")
        _publish(fresh, folder / "checkpoint.pth")
    finally:
        fresh.unlink(missing_ok=True)
    _sync_folder(folder)
    moments = _numbered(folder)
    past = sorted(m for m in moments if m <= now) if keep > 1 else []
    begun = [m for m in past if m[1] and m[0] == now[0] and now[1]]
    kept = [*[m for m in past if not m[1]][-keep:], *begun[-keep:]]
    for moment, path in moments.items():
        if moment not in kept:
            path.unlink()


def _number(epoch: int, update: int) -> str:
    """Name a moment's file: `update` updates of `epoch` made; 0 of one are the end of the epoch before."""
    return f"checkpoint_{epoch:04d}_{update:06d}.pth" if update else f"checkpoint_{epoch - 1:04d}.pth"


def _numbered(folder: Path) -> dict[tuple[int, int], Path]:
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := NUMBERED.fullmatch(path.name):
            epoch, update = match.groups()
            found[(int(epoch) + 1, 0) if update is None else (int(epoch), int(update))] = path
    return found


def find_all(folder: Path) -> list[Path]:
    """List a folder's resumable checkpoints, newest first; the best one, of whatever epoch, is the last resort."""
    numbered = _numbered(folder)
    named = [folder / "checkpoint.pth", folder / "best_checkpoint.pth"]
    return [numbered[n] for n in sorted(numbered, reverse=True)] + [path for path in named if path.is_file()]


def mend(folder: Path, best: Path | None) -> None:
    """Remove what a run that was killed while it saved has left; `best` is a file that it had not made the best yet."""
    for path in folder.glob(".*"):
        if path.name == ".checkpoint.new" or path.name.endswith(".tmp"):
            path.unlink(missing_ok=True)
    if best is not None and (match := NUMBERED.fullmatch(best.name)) and match[2] is None:
        _publish(best, folder / "best_checkpoint.pth")


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Raise InputError for a write into --output_dir that fails inside."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error  # torch's writer ends in an error of its own
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        reason = cause.strerror or _first_line(cause)
        raise InputError(
            f"--output_dir {folder}: cannot be written ({reason}); the last checkpoint is as it "
            "was: mend that, and go on with --resume auto"
        ) from None


def load(source: str | Path) -> dict[str, Any]:
    """Read a checkpoint (a file, or an http(s) URL) onto the CPU; a bare state dict becomes {"model": ...}.

    The zip's checksums are verified first, because torch does not; nothing is unpickled but tensors, plain types and
    the `ALLOWED` ones. Raises InputError with one line.
    """
    if str(source).startswith(("http://", "https://")):
        data = _download(str(source))
    else:
        path = Path(source)
        if not path.is_file():
            what = "a folder; name the file, such as checkpoint.pth in it" if path.is_dir() else "no such checkpoint"
            raise InputError(f"{source}: {what}")
        data = path
    _check_zip(data, source)
    try:
        with torch.serialization.safe_globals(ALLOWED):
            content = torch.load(data, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|global|function) ([\w.]*\.[\w.]+)", str(error))
        if found is None:
            raise InputError(f"{source}: not a readable checkpoint (is it a PyTorch file?)") from None
        raise InputError(
            f"{source}: refused, it holds {found[1]}, and only tensors and plain values are loaded; "
            "save its state_dict alone"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, TypeError, IndexError) as error:
        raise InputError(f"{source}: not a readable checkpoint ({_first_line(error)})") from None
    return _normalise(content, source)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(":. ")


def _download(url: str) -> io.BytesIO:
    from urllib.error import URLError
    from urllib.request import urlopen

    data = io.BytesIO()
    try:
        with urlopen(url, timeout=60) as reply:
            while part := reply.read(1 << 20):
                if data.tell() + len(part) > LARGEST_DOWNLOAD:
                    raise ValueError(f"larger than {LARGEST_DOWNLOAD >> 30} GiB; fetch it yourself, and name the file")
                data.write(part)
    except (URLError, HTTPException, OSError, ValueError) as error:
        raise InputError(f"{url}: cannot be fetched ({_first_line(error)})") from None
    data.seek(0)
    return data


def _check_zip(data: Path | io.BytesIO, source: str | Path) -> None:
    """Verify the checksums of a file in today's format; the one before torch 1.6 has none."""
    with open(data, "rb") if isinstance(data, Path) else io.BytesIO(data.getbuffer()[:2]) as f:
        if f.read(2) != b"PK":
            return
    try:
        with zipfile.ZipFile(data) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed, as PyTorch does not write")  # a little file may unpack to any size
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, OSError, zlib.error) as error:
        raise InputError(f"{source}: damaged or cut short ({_first_line(error)}); use an older checkpoint") from None
    if damaged is not None:
        raise InputError(f"{source}: damaged, the checksum of {damaged} inside it does not match; use an older one")
    if isinstance(data, io.BytesIO):
        data.seek(0)


def _normalise(content: Any, source: str | Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{source}: holds a {type(content).__name__}, not a checkpoint or state dict")
    if "model" not in content and "state_dict" in content:
        content = {**content, "model": content["state_dict"]}
    if "model" not in content:
        if not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
            raise InputError(f"{source}: no model in it (keys: {', '.join(map(str, list(content)[:6])) or 'none'})")
        content = {"model": content}
    if not isinstance(content["model"], dict):
        raise InputError(f"{source}: its model is a {type(content['model']).__name__}, not a state dict")
    return content


def flags_of(saved: dict[str, Any]) -> dict[str, Any]:
    """Give the flags of the run that wrote a checkpoint, or {}."""
    flags = saved.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    return flags if isinstance(flags, dict) else {}


def strip_prefixes(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop what wrappers put before names (module., _orig_mod.)."""
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", str(k)): v for k, v in state_dict.items()}


def load_weights(
    model: nn.Module, state_dict: dict[str, torch.Tensor], source: str | Path, what: str = "", remedy: str = ""
) -> None:
    """Load a state dict strictly; the error names a first difference and what to do."""
    state_dict = strip_prefixes(state_dict)
    own = model.state_dict()
    what = what or "weights"
    remedy = remedy or "give the --model, --input-size, --nb-classes and --model-kwargs it was trained with"

    def complain(names: Iterable[str], text: str) -> None:
        names = list(names)
        if names:
            raise InputError(
                f"{source}: its {what} do not fit the model: {len(names)} {text}, first {names[0]}; {remedy}"
            )

    complain((k for k in own if k not in state_dict), "tensors are missing")
    complain((k for k in state_dict if k not in own), "tensors are unknown")
    complain((k for k in own if not isinstance(state_dict[k], torch.Tensor)), "values are no tensors")
    shapes = {k: (tuple(state_dict[k].shape), tuple(own[k].shape)) for k in own}
    complain((f"{k} {a} in the file, {b} in the model" for k, (a, b) in shapes.items() if a != b), "shapes differ")
    model.load_state_dict(state_dict)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], source: str | Path) -> None:
    """Restore the optimizer's moments; rate, decay and the like stay as the command line has them now."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{source}: its optimizer state does not fit ({_first_line(error)}); was --opt, --weight-decay, "
            "--layer-decay, --freeze or the model different?"
        ) from None
    for group, now in zip(optimizer.param_groups, groups, strict=True):
        group.update(now)


def plain(value: Any, depth: int = 3) -> Any:
    """Reduce to types that any torch.load and any JSON reader accepts, no deeper than flags go.

    A stranger's file may hold a list of references to a list of references …, which would never end.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, dict | list | tuple) and (not depth or len(value) > 500):
        return "…"
    if isinstance(value, dict):
        return {str(k): plain(v, depth - 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, depth - 1) for v in value]
    return str(value) if isinstance(value, pathlib.PurePath) else type(value).__name__
