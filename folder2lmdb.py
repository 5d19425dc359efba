"""Put the images of train/CLASS/ and val/CLASS/ into train.lmdb and val.lmdb, and read them there.

`python folder2lmdb.py --dir PATH` builds; `python main.py --data-path PATH --use-lmdb` reads.
"""

import fcntl
import io
import json
import mmap
import os
import shutil
import signal
import sys
import time
import warnings
import zlib
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from util.class_folders import FORMATS, find_classes, list_images
from util.errors import InputError
from util.image_database import FORMAT, HEADER, TABLE, VERSION, ImageDatabase, key_of
from util.lmdb_file import rebuild
from util.parser import Parser

SPLITS = ("train", "val")
BATCH = 4 << 20  # bytes a transaction
CHUNK = 8  # images a task of a thread


class Writer:
    """Fill an empty file with images in order; `finish` makes a database of it.

    `map_size`, in bytes, is an address range rather than memory or disk, and doubles when it is full.
    """

    def __init__(self, path: Path, classes: Sequence[str], named: bool, map_size: int) -> None:
        self.path, self.classes, self.named = path, list(classes), named
        self.environment = lmdb.open(str(path), subdir=False, lock=False, sync=False, map_size=map_size)
        self.labels, self.sizes, self.checksums = array("i"), array("I"), array("I")
        self.paths: list[bytes | None] = []
        self.pending: list[tuple[bytes, bytes]] = []
        self.pending_bytes = 0

    def add(self, data: bytes, label: int, path: str | None) -> None:
        self.pending.append((key_of(len(self.labels)), data))
        self.pending_bytes += len(data)
        self.labels.append(label)
        self.sizes.append(len(data))
        self.checksums.append(zlib.crc32(data))
        self.paths.append(None if path is None else os.fsencode(path))
        if self.pending_bytes >= BATCH:
            self._flush()

    def _flush(self) -> None:
        self._put(self.pending, append=True)
        self.pending, self.pending_bytes = [], 0

    def _put(self, items: list[tuple[bytes, Any]], append: bool = False) -> None:
        while True:
            try:
                with self.environment.begin(write=True) as transaction:
                    transaction.cursor().putmulti(items, append=append)
                return
            except lmdb.MapFullError:
                self.environment.set_mapsize(2 * self.environment.info()["map_size"])

    def finish(self) -> None:
        self._flush()
        numbers = ((self.labels, np.int32), (self.sizes, np.uint32), (self.checksums, np.uint32))
        columns = [pa.array(np.frombuffer(values, kind)) for values, kind in numbers]
        columns.append(pa.array(self.paths, pa.large_binary()))
        table = pa.table(columns, names=["label", "size", "crc32", "path"])
        table = table.replace_schema_metadata({"classes": json.dumps(self.classes), "named": json.dumps(self.named)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        data = memoryview(sink.getvalue())
        self._put([(TABLE, data)])
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            where = [pages.rfind(data), len(data), zlib.crc32(data)]
        header = {"format": FORMAT, "version": VERSION, "count": len(self.labels), "table": where}
        self._put([(HEADER, json.dumps(header).encode())])

    def close(self) -> None:
        self.environment.close()


class Job(NamedTuple):
    """A database to build."""

    target: Path
    source: Path
    images: Sequence[tuple[str, int]] | ImageDatabase  # paths below `source` and labels, or a published database
    classes: Sequence[str]

    def items(self) -> Iterator[tuple[str | bytes, int, str]]:
        """Yield of each image: its file's path or bytes, label, and name to complain by."""
        if isinstance(self.images, ImageDatabase):
            for i in range(len(self.images)):
                yield *self.images[i], f"{self.source}, image {i}"
        else:
            for path, label in self.images:
                yield path, label, str(self.source / path)

    def needed(self) -> int:
        """Give the bytes that the database will take, a little too many rather than too few."""
        if isinstance(self.images, ImageDatabase):
            return os.path.getsize(self.images.path) + 200 * len(self.images) + (1 << 20)
        total = 1 << 20
        for path, _ in self.images:
            try:
                size = os.path.getsize(self.source / path)
            except OSError:
                size = 0  # told when it is read
            pages = 4096 * -(-(size + 16) // 4096) if size > 2000 else size
            total += pages + 100 + 2 * len(path)  # an image beyond half a page has pages of its own
        return total


def _load(source: Path, item: str | bytes, check: bool) -> tuple[bytes, str]:
    """Give an image's file, and what is wrong with it, or nothing."""
    data = b""
    try:
        if isinstance(item, bytes):
            data = item
        else:
            with open(os.path.join(source, item), "rb", buffering=0) as file:
                data = file.readall()
        if check:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.load()  # an RGB image is whole now; convert would copy it
                if image.mode != "RGB":
                    image.convert("RGB")
    except Exception as error:  # of any kind: Pillow's plugins raise what they like on damaged files
        return data, str(error).partition("\n")[0] or type(error).__name__
    return data, ""


def _load_chunk(source: Path, items: list[str | bytes], check: bool) -> list[tuple[bytes, str]]:
    return [_load(source, item, check) for item in items]


def _load_all(job: Job, workers: int, check: bool) -> Iterator[tuple[bytes, str, int, str | None, str]]:
    """Yield of each image in order: data, fault, label, path to keep, name to complain by."""
    window, items = deque(), iter(job.items())
    pool = ThreadPoolExecutor(workers)  # Pillow decodes, and files are read, outside Python's lock
    try:
        while True:
            while len(window) < 3 * workers and (chunk := list(islice(items, CHUNK))):
                window.append((pool.submit(_load_chunk, job.source, [item for item, *_ in chunk], check), chunk))
            if not window:
                return
            future, chunk = window.popleft()
            for loaded, (item, label, name) in zip(future.result(), chunk, strict=True):
                yield *loaded, label, item if isinstance(item, str) else None, name
    finally:
        pool.shutdown(cancel_futures=True)


def _lock(temporary: Path, target: Path) -> int:
    while True:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(temporary) and os.path.samestat(os.stat(temporary), os.fstat(handle)):
                if not os.fstat(handle).st_size:
                    return handle
                temporary.unlink()  # of a killed build: its lock died with it
        except BlockingIOError:
            os.close(handle)
            raise InputError(f"{target}: another build of it is running; wait for it, or stop it") from None
        os.close(handle)  # that file is gone: begin with another


@contextmanager
def _unfinished(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give an empty file beside `target`, locked against other builds; it becomes `target` or vanishes."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        handle = _lock(temporary, target)
        try:
            _check_target(target, overwrite)
            yield temporary
            os.fsync(handle)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)  # and with it the lock
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, lmdb.Error) as error:
        free = shutil.disk_usage(target.parent).free
        raise InputError(
            f"{target}: cannot be written ({error}; {free:,} bytes are free there); mend that, or add --out FOLDER"
        ) from None


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise InputError where something is in the way."""
    if overwrite and (target.is_file() or not target.exists()) or not os.path.lexists(target):
        return
    if target.is_dir():
        raise InputError(f"{target}: a folder is in the way; move it, or name another folder with --out")
    try:
        database = ImageDatabase(target)
        kind = "a published" if database.published is not None else "a complete"
        what = f"{kind} database of {len(database)} images"
    except InputError as error:
        what = str(error).removeprefix(f"{os.path.realpath(target)}: ").partition(";")[0]
    raise InputError(f"{target}: already there ({what}); add --overwrite to replace it, or --out FOLDER")


def build(
    job: Job, workers: int, check: bool = True, skip: bool = False, overwrite: bool = False, map_size: int = 0
) -> None:
    """Build one database, or leave things as they were; unreadable images stop it unless they are to be skipped."""
    start, needed, bad = time.perf_counter(), job.needed(), 0
    with _unfinished(job.target, overwrite) as temporary:
        free = shutil.disk_usage(job.target.parent).free
        if free < needed:
            raise InputError(
                f"{job.target}: needs {needed:,} bytes, and {free:,} are free there; make room, or name another "
                "folder with --out"
            )
        named = not isinstance(job.images, ImageDatabase)
        writer = Writer(temporary, job.classes, named, map_size or needed + needed // 8)
        bar = tqdm(total=len(job.images), desc=job.target.name, unit=" images", disable=None)
        with closing(writer), bar, closing(_load_all(job, workers, check)) as images:
            for data, fault, label, path, name in images:
                bar.update()
                if fault:
                    bad += 1
                    tqdm.write(f"{name}: not a readable image ({fault})", file=sys.stderr)
                elif not bad or skip:
                    writer.add(data, label, path)
            if bad and not skip:
                raise InputError(
                    f"{job.source}: {bad} unreadable images, named above; mend or remove them, or leave them out with "
                    "--skip-corrupt"
                )
            if not len(writer.labels):
                raise InputError(f"{job.source}: no readable image in it")
            writer.finish()
    gone = f", {bad} unreadable ones left out" if bad else ""
    print(
        f"{job.target}: {len(job.images) - bad} images of {len(job.classes)} classes{gone}, "
        f"{job.target.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s"
    )


def _convert(source: Path, target: Path) -> Job:
    images = ImageDatabase(source)
    if images.published is None:
        raise InputError(f"{source}: already of this format, with nothing to build it from; --verify checks it")
    return Job(target, source, images, images.classes)


def plan(source: Path, splits: Sequence[str], out: Path) -> list[Job]:
    """Find what to build from a folder of splits, or from a published database; raises InputError."""
    if source.is_file():
        return [_convert(source, out / source.name)]
    if not source.is_dir():
        raise InputError(f"--dir {source}: no such folder or file; name the folder that holds train/ and val/")
    found = [s for s in SPLITS if (source / s).is_dir()] or [s for s in SPLITS if (source / f"{s}.lmdb").is_file()]
    if not found:
        raise InputError(f"--dir {source}: neither train/ nor val/ in it; images belong into {source}/train/CLASS/")
    class_map = find_classes(source / "train")[1] if (source / "train").is_dir() else None
    jobs = []
    for split in splits or found:
        folder, target = source / split, out / f"{split}.lmdb"
        if folder.is_dir():
            classes, numbers = find_classes(folder, class_map)
            jobs.append(Job(target, folder, list_images(folder, numbers), classes))
        elif (source / f"{split}.lmdb").is_file():
            jobs.append(_convert(source / f"{split}.lmdb", target))
        else:
            raise InputError(f"{folder}: no such folder; leave {split} out of --split, or put it there")
    return jobs


def check_databases(targets: Sequence[Path]) -> None:
    """Read every image of databases again; raises InputError where one is not as it was written."""
    faults = []
    for target in targets:
        database = ImageDatabase(target)
        bad = database.verify()
        for what in bad:
            print(f"{target}: {what} is damaged", file=sys.stderr)
        faults += [f"{target}: {len(bad)} of {len(database)} damaged, named above"] if bad else []
        if not bad:
            print(f"{target}: OK, {len(database)} images{' (no checksums in it)' if database.published else ''}")
    if faults:
        raise InputError(f"{'; '.join(faults)}; copy or build again: {rebuild(targets[0])}")


def run(argv: Sequence[str]) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = Parser(prog="folder2lmdb.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--dir", required=True, metavar="PATH", help="folder of train/CLASS/ and val/CLASS/, or of published databases")
    add("--split", nargs="+", default=[], choices=SPLITS, help="default: those that are there")
    add("--out", metavar="FOLDER", help="where train.lmdb and val.lmdb go; default: --dir")
    add("--workers", type=int, default=cores, help=f"images read and decoded at once; default: {cores}")
    add("--overwrite", action="store_true", help="replace what is there, once the new one is complete")
    add("--verify", action="store_true", help="check existing databases, or those just built, by their checksums")
    add("--no-check", action="store_true", help="do not decode each image to see that it can be")
    add("--skip-corrupt", action="store_true", help="leave unreadable images out, instead of stopping")
    args = parser.parse_args(list(argv))
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: takes a number of at least 1")
    source = Path(args.dir)
    out = Path(args.out or (source.parent if source.is_file() else source))
    if not out.is_dir() and (args.out or source.exists()):
        raise InputError(f"--out {out}: no such folder; make it first")
    names = [source.name] if source.is_file() else [f"{s}.lmdb" for s in args.split or SPLITS]
    there = [out / name for name in names if os.path.lexists(out / name)]
    if not (args.verify and there and not args.overwrite):
        jobs = plan(source, args.split, out)
        for job in jobs:
            _check_target(job.target, args.overwrite)
        for job in jobs:
            build(job, args.workers, not args.no_check, args.skip_corrupt, args.overwrite)
        there = [job.target for job in jobs]
    if args.verify:
        check_databases(there)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit status: 0, 2 for what the caller can mend, 130 when it was stopped."""

    def stop(number: int, frame) -> None:
        for s in before:
            signal.signal(s, signal.SIG_IGN)  # once is enough: what follows removes the unfinished file
        raise KeyboardInterrupt

    before = {}
    try:
        before |= {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on what loads nonetheless
            run(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"folder2lmdb.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        print(f"folder2lmdb.py: error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("folder2lmdb.py: stopped; no unfinished database is left", file=sys.stderr, flush=True)
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
