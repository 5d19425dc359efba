"""Read image databases that the published folder2lmdb.py wrote, with a pyarrow that can no longer write them.

Keys are b"0", b"1", …, b"__len__", b"__keys__". A value is 16 bytes of header, then an Arrow stream with one column of
one row: the pair (image bytes, label), or the length. There are no class names; records are in ImageFolder's order.
"""

import os
from pathlib import Path
from typing import Any

import lmdb
import pyarrow as pa

from util.errors import InputError

HEADER = 16

# py-lmdb opens a path once a process, and a forked child inherits that: one table for all readers, emptied in a child.
_open: dict[str, lmdb.Environment] = {}


def _forget_inherited() -> None:
    for environment in _open.values():
        environment.close()  # the child's handle; the parent's stays open
    _open.clear()


os.register_at_fork(after_in_child=_forget_inherited)


def _environment(path: str) -> lmdb.Environment:
    if path not in _open:
        environment = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False)
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if os.path.getsize(path) < needed:  # reading past the end of the map would kill the process
            environment.close()
            raise InputError(f"{path}: cut short, {os.path.getsize(path)} of at least {needed} bytes; copy it again")
        _open[path] = environment
    return _open[path]


class PublishedLMDB:
    """One database, opened where and when it is read: works in any worker, pickled or copied.

    Raises InputError, naming the file, when it is missing, damaged or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = os.path.realpath(path)
        if not os.path.isfile(self.path):
            raise InputError(f"{path}: no such file; --use-lmdb reads train.lmdb and val.lmdb in --data-path")
        self.length = self._value(b"__len__")
        if not isinstance(self.length, int) or self.length < 1:
            raise InputError(f"{path}: it says it holds {self.length} images; build it again")
        self.num_classes = self[self.length - 1][1] + 1

    def _value(self, key: bytes) -> Any:
        try:
            with _environment(self.path).begin(buffers=True) as transaction:
                value = transaction.get(key)
                if value is None:
                    raise InputError(f"{self.path}: no {key.decode()} in it, so it is incomplete; build it again")
                stream = pa.py_buffer(bytes(value[HEADER:]))
            return pa.ipc.open_stream(stream).read_all().column(0)[0].as_py()
        except (lmdb.Error, pa.ArrowInvalid, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{self.path}: not an image database of the published format ({reason})") from None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """Give the image's bytes, as they were in its file, and its label."""
        value = self._value(str(index).encode())
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], bytes)):
            raise InputError(f"{self.path}: record {index} is not an image and its label; build it again")
        return value[0], value[1]
