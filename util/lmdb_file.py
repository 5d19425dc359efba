"""Open single LMDB files for reading: once a process, in any worker, without writing a byte beside them."""

import os
from pathlib import Path

import lmdb

from util.errors import InputError

# py-lmdb refuses to open a file twice in a process, and a forked child inherits that. So there is one environment a
# file for all readers of a process, and a child goes on with its parent's, whose pages it shares: without a lock file
# a read transaction has nothing to lose by a fork. None is ever closed, so that views of its pages stay valid.
_open: dict[tuple[int, int], lmdb.Transaction] = {}


def rebuild(path: str | Path) -> str:
    """Give the command that writes a database anew."""
    return f"python folder2lmdb.py --dir {os.path.dirname(path) or '.'} --overwrite"


def read_transaction(path: str | Path) -> lmdb.Transaction:
    """Give this process's transaction on a file; what it reads are memoryviews of the file.

    Raises InputError, naming the file, when it is missing, a folder, no LMDB file or cut short.
    """
    again = f"build it again: {rebuild(path)}"
    try:
        status = os.stat(path)
    except OSError:
        command = rebuild(path).removesuffix(" --overwrite")
        raise InputError(f"{path}: no such file; --use-lmdb reads what `{command}` writes") from None
    if os.path.isdir(path):
        raise InputError(f"{path}: a folder, not an image database, which is one file; move it away, and {again}")
    if not status.st_size:
        raise InputError(f"{path}: not an image database but an empty file; {again}")
    key = status.st_dev, status.st_ino
    if key not in _open:
        try:
            environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
        except (lmdb.Error, OSError) as error:
            reason = str(error).splitlines()[0].removeprefix(f"{path}: ")
            raise InputError(f"{path}: not an image database, nor any other LMDB file ({reason}); {again}") from None
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if status.st_size < needed:  # reading past the end of the map would kill the process
            environment.close()
            raise InputError(f"{path}: cut short, {status.st_size} of at least {needed} bytes; copy it, or {again}")
        _open[key] = environment.begin(buffers=True)
    return _open[key]
