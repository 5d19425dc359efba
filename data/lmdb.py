"""Image databases, one LMDB file per split: the format that folder2lmdb.py writes, and the reader.

The keys 0, 1, ... (8 bytes, big-endian) hold the image files, unchanged and in ImageFolder's order. `table` holds an
Arrow file with a row per image (columns label, crc32, and path below the split's folder) and the class names in its
metadata. `header` is JSON: format, version, and as `table` the table's size and crc32. Version 1 had a column `size`,
and the offset of the table in the file before its size.

The script published with EViT (https://github.com/youweiliang/evit) wrote another format, which is read as it is: the
keys b"0", b"1", ..., b"__len__" hold 16 bytes of header and then an Arrow stream with one column of one row, which is
the pair (image file, label) or the number of images. It has neither class names nor paths.
"""

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import lmdb
import pyarrow as pa

from util.errors import InputError

# of what is written now; version 1 is read too
FORMAT = "image folder"
VERSION = 2
HEADER = b"header"
TABLE = b"table"

# py-lmdb refuses to open a file twice in a process, so the readers of a file (device, inode) share its environment.
_environments = WeakValueDictionary()


def _close_inherited() -> None:
    for environment in _environments.values():
        environment.close()
    _environments.clear()


# LMDB forbids the use of an environment after a fork; the readers of the child open the file again.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def record_key(index: int) -> bytes:
    # big-endian: LMDB sorts keys bytewise, so the images stay in order
    return index.to_bytes(8, "big")


def rebuild_hint(path: str | Path) -> str:
    replace = " --overwrite" if os.path.exists(path) else ""
    return f"copy the file again or build it: python folder2lmdb.py --dir {os.path.dirname(path) or '.'}{replace}"


class ImagePaths(Sequence):
    """The paths of the images below the folder of their split, each decoded when it is asked for."""

    def __init__(self, column: pa.Array) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.column[index].as_py())


class ImageDatabase:
    """The images of one database file, in today's format or the published one.

    Opening reads the table, some 30 bytes per image. Works in workers of any start method, pickled or copied.
    Raises InputError, which names the file and the command that rebuilds it, if it is missing, cut, foreign or damaged,
    or if its header is not `header`, that of the file when it was pickled.

    Attributes:
        classes: the class names, or numbers as strings where `has_class_names` is false.
        labels: int32 [N], read-only; None in the published format.
        paths: below the folder of the split; None in the published format.
    """

    # as in the published format
    has_class_names = False
    labels = None
    paths = None

    def __init__(self, path: str | Path, header: bytes | None = None) -> None:
        self.path = os.path.realpath(path)
        if not os.path.exists(path):
            raise self._error("no such file")
        try:
            self._open_environment()
            self._header = self._get(HEADER)
            if header not in (None, self._header):
                raise InputError(f"{self.path}: replaced since it was opened; start the run again")
            if self._header is not None:
                self._open_table(json.loads(self._header))
            else:
                self._length = self._decode_published(b"__len__")
                # The records are in the order of the classes, so the last one has the largest label.
                _, label = self._decode_published(b"%d" % (self._length - 1))
                self.classes = list(map(str, range(label + 1)))
        except InputError:
            raise
        except Exception as error:
            # Of any kind: a folder, another file, another program's LMDB, or half of one. What fails first is a hint.
            raise self._error(f"not an image database, or damaged ({type(error).__name__}: {error})") from None

    def __reduce__(self):
        # the header has the table's checksum: whoever holds labels of this file must not get images of another
        return ImageDatabase, (self.path, self._header)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """Return an image file, unchanged, and its label. Raises InputError if they are damaged."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        try:
            if self.labels is None:
                data, label = self._decode_published(b"%d" % index)
                intact = isinstance(data, bytes)
            else:
                data = self._get(record_key(index))
                label = int(self.labels[index])
                intact = zlib.crc32(data) == self._checksums[index]
            if intact and 0 <= label < len(self.classes):
                return data, label
        except Exception:
            # Arrow and LMDB raise errors of many kinds; the one below names the image.
            pass
        raise InputError(f"{self.describe(index)}: missing or damaged; {rebuild_hint(self.path)}")

    def describe(self, index: int) -> str:
        """Return how error messages name an image: by file, index and, where it is known, path."""
        path = f" ({self.paths[index]})" if self.paths else ""
        return f"{self.path}: image {index}{path}"

    def _error(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}; {rebuild_hint(self.path)}")

    def _open_environment(self) -> None:
        """Open the file, unless another reader of this process has done so."""
        status = os.stat(self.path)
        self._file_id = (status.st_dev, status.st_ino)
        # It is closed with the last reader that refers to it.
        self._environment = _environments.get(self._file_id)
        if self._environment is None:
            self._environment = lmdb.open(self.path, subdir=False, readonly=True, lock=False, readahead=False)
            _environments[self._file_id] = self._environment
        # A process that touches a page of the map beyond the end of the file is killed.
        pages = self._environment.info()["last_pgno"] + 1
        expected_size = pages * self._environment.stat()["psize"]
        if status.st_size < expected_size:
            raise self._error(f"cut short, {status.st_size} of {expected_size} bytes")

    def _get(self, key: bytes) -> bytes | None:
        # after a fork
        if self._file_id not in _environments:
            self._open_environment()
        with self._environment.begin() as transaction:
            return transaction.get(key)

    def _open_table(self, header: dict) -> None:
        if header["version"] > VERSION:
            raise self._error(f"of format {header['format']} {header['version']}: update this program")
        # Version 1 has the table's offset and size too
        *_, crc32 = header["table"]
        content = self._get(TABLE)
        if zlib.crc32(content) != crc32:
            raise self._error("damaged labels and paths")
        # It was written as one batch
        table = pa.ipc.open_file(content).get_batch(0)
        self._length = table.num_rows
        self.classes = json.loads(table.schema.metadata[b"classes"])
        self.has_class_names = json.loads(table.schema.metadata[b"named"])
        self.labels = table["label"].to_numpy()
        self._checksums = table["crc32"].to_numpy()
        # Version 1 could be converted from the published format, and then has no paths.
        if not table["path"].null_count:
            self.paths = ImagePaths(table["path"])

    def _decode_published(self, key: bytes) -> int | list:
        # behind 16 bytes of header
        table = pa.ipc.open_stream(self._get(key)[16:]).read_all()
        # offsets are checked before they are followed
        table.validate(full=True)
        return table[0][0].as_py()
