"""Write the images of train/CLASS/ and val/CLASS/ to train.lmdb and val.lmdb, for --use-lmdb."""

import argparse
import json
import os
import signal
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import pyarrow as pa
from lmdb.verify import VerifyError, verify
from tqdm import tqdm

from data.images import ImageFiles, decode_rgb, find_classes, list_images, read_file
from data.lmdb import FORMAT, HEADER, TABLE, VERSION, ImageDatabase, rebuild_hint, record_key
from util.command import Parser, add_flags, positive_int, run_command
from util.errors import InputError

SPLITS = ("train", "val")
# images per transaction, because each costs time
BATCH_SIZE = 32
# images that are read at a time, and may be in memory
CHUNK_SIZE = 256
# bytes of address space, which cost neither memory nor disk: no data set is larger
MAP_SIZE = 2**40

FLAGS = (
    ("--out", Path, None, "folder for train.lmdb and val.lmdb (default: --dir)"),
    ("--workers", positive_int, os.cpu_count(), "threads that read and decode images"),
    ("--overwrite", bool, False, "replace existing databases, each when the new one is complete"),
    ("--verify", bool, False, "check the existing databases, or those just written"),
    ("--no-check", bool, False, "do not decode the images to check them"),
    ("--skip-corrupt", bool, False, "leave unreadable images out instead of stopping"),
)


def load_in_order(paths: Sequence[str], workers: int, check: bool) -> Iterator[bytes | InputError]:
    """Yield the content of image files, or what is wrong with them, in order."""

    def load(path: str) -> bytes | InputError:
        try:
            data = read_file(path)
            if check:
                decode_rgb(data, path)
            return data
        except InputError as error:
            return error

    # Threads are enough: Pillow releases the GIL while decoding.
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(paths), CHUNK_SIZE):
            yield from pool.map(load, paths[start : start + CHUNK_SIZE])


def put(environment: lmdb.Environment, records: Sequence[tuple[bytes, bytes]]) -> None:
    """Write pairs of key and value in one transaction."""
    with environment.begin(write=True) as transaction:
        transaction.cursor().putmulti(records)


def write_images(environment: lmdb.Environment, folder: Path, samples: Iterable[tuple]) -> list[tuple]:
    """Write the images of samples (path, label, what `load_in_order` yields), and name those that could not be read.

    Returns the rows of the table: label, crc32, and path below the folder.
    """
    batch = []
    rows = []
    for path, label, data in samples:
        if isinstance(data, InputError):
            tqdm.write(str(data), file=sys.stderr)
            continue
        batch.append((record_key(len(rows)), data))
        # names of files are bytes that need not be UTF-8
        rows.append((label, zlib.crc32(data), os.fsencode(os.path.relpath(path, folder))))
        if len(batch) == BATCH_SIZE:
            put(environment, batch)
            batch.clear()
    put(environment, batch)
    return rows


def write_table(environment: lmdb.Environment, rows: Sequence[tuple], classes: Sequence[str]) -> None:
    """Write the table and the header. They come last: the reader looks for the table at the end of the file."""
    columns = {
        "label": pa.int32(),
        "crc32": pa.uint32(),
        "path": pa.large_binary(),
    }
    schema = pa.schema(columns, {"classes": json.dumps(classes), "named": "true"})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as file:
        values = list(zip(*rows, strict=True))
        file.write(pa.record_batch(values, schema))
    table = sink.getvalue()
    header = {
        "format": FORMAT,
        "version": VERSION,
        "table": [len(table), zlib.crc32(table)],
    }
    put(environment, [(TABLE, table), (HEADER, json.dumps(header).encode())])


def build(
    folder: Path,
    target: Path,
    images: ImageFiles,
    loaded: Iterable[bytes | InputError],
    skip_corrupt: bool,
) -> None:
    """Write one database, all of it or nothing. Raises InputError for unreadable images unless they are skipped."""
    progress = tqdm(
        loaded,
        target.name,
        len(images),
        unit=" images",
        disable=None,
    )
    samples = zip(images.files, images.targets, progress, strict=True)
    temporary = target.with_name(f".{target.name}.tmp")
    # It is a lock at the same time: there is one writer.
    try:
        temporary.open("xb").close()
    except FileExistsError:
        raise InputError(f"{temporary}: another build is writing it; if that was killed, remove it") from None
    try:
        # No transaction waits for the disk, as an unfinished file is worthless.
        with lmdb.open(str(temporary), MAP_SIZE, subdir=False, lock=False, sync=False) as environment:
            rows = write_images(environment, folder, samples)
            corrupt = len(images) - len(rows)
            if corrupt and not (skip_corrupt and rows):
                remedy = "replace them or add --skip-corrupt" if rows else "replace them"
                raise InputError(f"{folder}: {corrupt} unreadable images above; {remedy}")
            write_table(environment, rows, images.classes)
            environment.sync(True)
        temporary.replace(target)
    except (OSError, lmdb.Error) as error:
        raise InputError(f"{target}: cannot be written ({error}); free space or pass --out FOLDER") from None
    finally:
        # after Ctrl-C and SIGTERM too
        temporary.unlink(missing_ok=True)
    skipped = f", {corrupt} unreadable ones left out" if corrupt else ""
    print(f"{target}: {len(rows)} images of {len(images.classes)} classes{skipped}")


def verify_database(path: Path) -> None:
    """Check a database's structure, size, labels, paths and images. Raises InputError if anything is damaged."""
    # The walk in Python comes first, because a crafted file can crash a process through LMDB itself.
    try:
        problems = verify(path, subdir=False)
    except VerifyError as error:
        problems = [error]
    if problems:
        raise InputError(f"{path}: damaged ({problems[0]}); {rebuild_hint(path)}")
    # size, header, labels and paths; then every image against its checksum
    database = ImageDatabase(path)
    for _ in tqdm(database, path.name, unit=" images", disable=None):
        pass
    # The published format has no checksums.
    print(f"{path}: OK, {len(database)} images{' (no checksums)' if database.labels is None else ''}")


def write_databases(args: argparse.Namespace, out: Path) -> None:
    """Write train.lmdb and val.lmdb. All folders are checked before the first image is read."""
    splits = args.split or [split for split in SPLITS if (args.dir / split).is_dir()]
    if not splits:
        raise InputError(f"--dir {args.dir}: neither train/ nor val/ in it; name the folder above train/CLASS/")
    if not out.is_dir():
        raise InputError(f"--out {out}: no such folder; make it first")
    # The validation split takes the training split's class numbers, if there is one.
    train = args.dir / "train"
    class_to_idx = find_classes(train) if train.is_dir() else None
    jobs = []
    for split in splits:
        target = out / f"{split}.lmdb"
        if target.exists() and not args.overwrite:
            raise InputError(f"{target}: exists; add --overwrite to replace the file, or pass --out FOLDER")
        folder = args.dir / split
        numbers = find_classes(folder, class_to_idx)
        images = ImageFiles(*list_images(folder, numbers), list(numbers), None)
        jobs.append((folder, target, images))

    for folder, target, images in jobs:
        loaded = load_in_order(images.files, args.workers, not args.no_check)
        build(folder, target, images, loaded, args.skip_corrupt)


def run(argv: list[str]) -> None:
    # SIGTERM raises KeyboardInterrupt, so that the unfinished file is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = Parser(prog="folder2lmdb.py", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="folder that holds train/CLASS/ and val/CLASS/")
    parser.add_argument("--split", nargs="+", choices=SPLITS, help="splits to write (default: those in --dir)")
    add_flags(parser, FLAGS)
    args = parser.parse_args(argv)
    out = args.out or args.dir
    targets = [out / f"{split}.lmdb" for split in args.split or SPLITS]
    # --verify alone builds nothing where there is something to check.
    if args.overwrite or not args.verify or not any(target.exists() for target in targets):
        write_databases(args, out)
    if args.verify:
        for target in filter(Path.exists, targets):
            verify_database(target)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("folder2lmdb.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
