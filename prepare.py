"""Lay out a downloaded data set as train/CLASS/ and val/CLASS/, by links.

`python prepare.py domainnet ROOT --set clipart --out DATA`: ROOT holds what clipart.zip unpacks to (clipart/CLASS/FILE)
and the lists clipart_train.txt and clipart_test.txt; docs/paper.md says where they can be downloaded.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from util.command import REQUIRED, Parser, add_flags, run_command
from util.config import DOMAIN_NET
from util.errors import InputError

# training images, test images and classes of the paper's sets, those that DomainNet's authors call cleaned
SIZES = {
    "clipart": (33525, 14604, 345),
    "infograph": (36023, 15582, 345),
    "painting": (50416, 21850, 345),
    "quickdraw": (120750, 51750, 345),
    "real": (120906, 52041, 345),
    "sketch": (48212, 20916, 345),
}

FLAGS = (
    ("--set", DOMAIN_NET, REQUIRED, "which of the six sets"),
    ("--out", str, REQUIRED, "folder to make, with train/ and val/"),
)


def read_list(path: Path, labels: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """Yield class and file of each line `SET/CLASS/FILE LABEL` of a list; `labels` collects the label of each class.

    Raises InputError, with the line's number, for another format, a missing file, and a class with a second label or a
    label with a second class.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such list; download it to {path.parent}")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        # names may hold spaces
        name, _, label = line.rpartition(" ")
        if name.count("/") != 2 or not label.isdecimal():
            raise InputError(f"{path}, line {number}: {line!r} is not SET/CLASS/FILE LABEL; download the list again")
        file = path.parent / name
        if not file.is_file():
            raise InputError(f"{path}, line {number}: {file} is missing; unpack the archive in {path.parent}")
        class_name = file.parent.name
        if labels.setdefault(class_name, label) != label or len(set(labels.values())) < len(labels):
            raise InputError(f"{path}, line {number}: {class_name} had another label, or {label} another class, before")
        yield class_name, file


def prepare_domainnet(root: Path, name: str, out: Path) -> None:
    """Link the images of a set's lists into `out`/train and `out`/val, and compare their numbers with the paper's."""
    labels = {}
    # each image once
    train, val = [dict.fromkeys(read_list(root / f"{name}_{split}.txt", labels)) for split in ("train", "test")]
    # nothing is made unless all is there
    for folder, images in ((out / "train", train), (out / "val", val)):
        for class_name, file in images:
            (folder / class_name).mkdir(parents=True, exist_ok=True)
            (folder / class_name / file.name).symlink_to(file.resolve())

    found = len(train), len(val), len(labels)
    counts = "{} training and {} validation images of {} classes"
    print(f"{out}: {counts.format(*found)}")
    if found != SIZES[name]:
        print(f"Warning: the paper has {counts.format(*SIZES[name])}: other lists than docs/paper.md names?")


def run(argv: list[str]) -> None:
    parser = Parser(prog="prepare.py", description=__doc__)
    data_sets = parser.add_subparsers(metavar="DATA_SET", required=True)
    domainnet = data_sets.add_parser("domainnet", help="one of DomainNet's six sets")
    domainnet.add_argument(
        "root",
        type=Path,
        metavar="ROOT",
        help="folder of the unpacked archive and the lists",
    )
    add_flags(domainnet, FLAGS)
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.exists():
        raise InputError(f"--out {out}: exists already; name another folder")
    prepare_domainnet(args.root, args.set, out)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("prepare.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
