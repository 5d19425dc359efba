"""Lay out a downloaded data set as SPLIT/CLASS/FILE, with links to its images: train/, val/ and what else it has.

`python prepare.py domainnet ROOT --set clipart --out DATA`: ROOT holds what clipart.zip unpacks to (clipart/CLASS/FILE)
and the lists clipart_train.txt and clipart_test.txt; docs/paper.md says where they can be downloaded. The other data
sets are in docs/small_data.md.
"""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from util.command import REQUIRED, Parser, add_flags, run_command
from util.config import DOMAIN_NET
from util.errors import InputError

# training images, test images and classes of the paper's sets, from the lists that DomainNet's authors call cleaned
SIZES = {
    "clipart": (33525, 14604, 345),
    "infograph": (36023, 15582, 345),
    "painting": (50416, 21850, 345),
    "quickdraw": (120750, 51750, 345),
    "real": (120906, 52041, 345),
    "sketch": (48212, 20916, 345),
}
# which list becomes which folder
LISTS = (("train", "train"), ("test", "val"))

OUT_FLAG = ("--out", Path, REQUIRED, "folder to make, with train/ and val/")
SET_FLAG = ("--set", DOMAIN_NET, REQUIRED, "which of the six sets")

# per image: where it is listed (for errors), its target SPLIT/CLASS/FILE, and the file to link or image to write there
Samples = Iterator[tuple[str, str, Path | Image.Image]]


@contextmanager
def name_errors(path: Path, layout: str) -> Iterator[None]:
    """Raise InputError, with the file's name and the `layout` it should have, for what goes wrong inside."""
    try:
        yield
    except (OSError, EOFError, ValueError, LookupError, TypeError, BadZipFile, csv.Error) as error:
        raise InputError(
            f"{path}: not {layout} ({type(error).__name__}: {error}); correct it, download it again, or name another"
        ) from None


def read_domainnet(root: Path, name: str) -> Samples:
    """Read the folder of an unpacked archive and its two lists, whose lines are `SET/CLASS/FILE LABEL`."""
    # labels by folder, and folders by label
    labels = {}
    for list_name, split in LISTS:
        path = root / f"{name}_{list_name}.txt"
        with name_errors(path, "a list of DomainNet"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                where = f"{path}, line {number}"
                # names may hold spaces
                file, _, label = line.rpartition(" ")
                folder = Path(file).parent
                if labels.setdefault(folder, label) != label or labels.setdefault(label, folder) != folder:
                    raise InputError(f"{where}: {folder} had another label or {label} another folder; correct the list")
                yield where, f"{split}/{file.partition('/')[2]}", root / file


def read_tiny_imagenet(root: Path) -> Samples:
    """Read tiny-imagenet-200: train/CLASS/images/, and the flat val/images/ with val/val_annotations.txt."""
    for file in root.glob("train/*/images/*.JPEG"):
        yield str(file), f"train/{file.parts[-3]}/{file.name}", file
    path = root / "val/val_annotations.txt"
    with name_errors(path, "Tiny-ImageNet's list of file, class and box, separated by tabs"):
        for line in path.read_text().splitlines():
            name, class_name, *_ = line.split("\t")
            yield str(path), f"val/{class_name}/{name}", root / "val/images" / name


def read_chaoyang(root: Path) -> Samples:
    """Read the folder of train.json, test.json and the images that they list."""
    for list_name, split in LISTS:
        path = root / f"{list_name}.json"
        with name_errors(path, 'a JSON list of {"name": FILE, "label": CLASS}'):
            for entry in json.loads(path.read_bytes()):
                file = root / entry["name"]
                yield str(path), f"{split}/{entry['label']}/{file.name}", file


def read_medmnist(path: Path) -> Samples:
    """Read an .npz with train_images, train_labels and so on; classes are called by their numbers."""
    with name_errors(path, "an .npz of MedMNIST with 2D images and one label for each"), np.load(path) as arrays:
        for split in ("train", "val", "test"):
            images = arrays[f"{split}_images"]  # N, H, W or N, H, W, 3
            labels = arrays[f"{split}_labels"]  # N, 1
            if labels.size != len(images):
                raise ValueError(
                    f"{split}_labels is {labels.shape} for {len(images)} images; multi-label sets do not fit"
                )
            if images.dtype != np.uint8:
                raise ValueError(f"{split}_images is {images.dtype}, not uint8")
            for i, label in enumerate(labels.flat):
                # padded, since class folders are sorted as text
                yield str(path), f"{split}/{label:02}/{i:06}.png", Image.fromarray(images[i])


def read_csv(path: Path) -> Samples:
    """Read a CSV with columns path (relative to the CSV), label and, unless all images are for training, split."""
    # spreadsheets write a byte order mark
    with name_errors(path, "a CSV with columns path, label"), open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, restval="", skipinitialspace=True, strict=True)
        rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            # an unquoted comma, or a quote without its pair
            if None in row or {"\n", "\r", "\0"}.intersection("".join(row.values())):
                raise InputError(f"{where}: too many fields, or a line break within one; quote fields that hold commas")
            # files of several folders may share a name
            name = row["path"].replace("/", "_")
            target = f"{row.get('split', 'train').strip()}/{row['label'].strip()}/{name}"
            yield where, target, path.parent / row["path"]


def check_targets(samples: Samples) -> Samples:
    """Pass samples on; raise InputError for a file that is listed in two classes or two splits."""
    targets = {}
    for where, target, source in samples:
        if isinstance(source, Path) and targets.setdefault(source.resolve(), target) != target:
            before = targets[source.resolve()]
            raise InputError(f"{where}: {source} is listed as {target}, and before as {before}; correct the list")
        yield where, target, source


def lay_out(samples: Samples, out: Path) -> None:
    """Link or write the images to `out`/SPLIT/CLASS/FILE; `out` appears when it is complete.

    Raises InputError for a missing file, a name that no folder can have, two files that would get one name, and a class
    without training images.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    # after an error it is removed
    with TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary, out.name)
        for where, target, source in samples:
            parts = target.split("/")
            if len(parts) != 3 or {"", ".", ".."}.intersection(parts):
                raise InputError(f"{where}: {target!r} is not SPLIT/CLASS/FILE: each must have a name, without / in it")
            path = folder / target
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, Image.Image):
                source.save(path)
            elif not source.is_file():
                raise InputError(f"{where}: {source} is missing; unpack it there, or correct the list")
            elif not path.exists():
                path.symlink_to(source.resolve())
            # a line may come twice
            elif not path.samefile(source):
                raise InputError(f"{where}: {target} is {path.resolve()} already; rename one of the two")

        # a class without training images cannot be predicted
        if not folder.exists():
            raise InputError("there are no images in the lists: correct them")
        for path in folder.glob("*/*"):
            if not (folder / "train" / path.name).exists():
                raise InputError(f"class {path.name} is not in train; correct its label, or the training split's name")
        folder.rename(out)


READERS = {
    "domainnet": read_domainnet,
    "tiny-imagenet": read_tiny_imagenet,
    "chaoyang": read_chaoyang,
    "medmnist": read_medmnist,
    "csv": read_csv,
}


def run(argv: list[str]) -> None:
    parser = Parser(prog="prepare.py", description=__doc__)
    data_sets = parser.add_subparsers(dest="data_set", required=True)
    for name, read in READERS.items():
        subparser = data_sets.add_parser(name, help=read.__doc__, description=read.__doc__)
        subparser.add_argument("source", type=Path, help="the file or folder to read")
        add_flags(subparser, [SET_FLAG, OUT_FLAG] if name == "domainnet" else [OUT_FLAG])
    args = parser.parse_args(argv)
    out = args.out
    if out.exists():
        raise InputError(f"--out {out}: exists already; name another folder")

    # DomainNet's reader takes the set's name too
    names = [args.set] if "set" in args else []
    lay_out(check_targets(READERS[args.data_set](args.source, *names)), out)
    found = tuple(len(list(out.glob(pattern))) for pattern in ("train/*/*", "val/*/*", "train/*"))
    counts = "{} training and {} validation images of {} classes"
    print(f"{out}: {counts.format(*found)}")
    for name in names:
        if found != SIZES[name]:
            print(f"Warning: the paper has {counts.format(*SIZES[name])}: other lists than docs/paper.md names?")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("prepare.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
