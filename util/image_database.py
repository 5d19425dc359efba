"""Image databases: one LMDB file a split, which folder2lmdb.py writes, and its reader.

Under the keys 0, 1, … (8 bytes, big-endian) lie the images' files as they were, in ImageFolder's order. Under `table`
lies an Arrow file of a row an image: label, size, crc32, path below the split's folder; its metadata has the names of
the classes. Under `header`, written last, lie format, version and count, and where in the file the table begins, its
size and its crc32, as JSON.
"""

import json
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from util.errors import InputError
from util.lmdb_file import DamagedError, LMDBFile, rebuild
from util.published_lmdb import LENGTH, PublishedLMDB

FORMAT, VERSION = "image folder", 1
TABLE, HEADER = b"table", b"header"
PART = 4 << 20  # bytes read at once


def key_of(index: int) -> bytes:
    return struct.pack(">Q", index)


class Paths(Sequence):
    """The images' paths below their split's folder, each read when it is asked for."""

    def __init__(self, column: pa.Array) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.column[index].as_py())


class ImageDatabase:
    """Read the images of one file, of this program's format or of the published script's.

    Opening reads a page or two, however many images there are. Works in any worker, pickled or copied. `classes` are
    names, or with `named` false numbers, as the published script kept no names; `labels` [N], int32 and read-only, and
    `paths` lie in the file, and are None in the published format. Raises InputError, naming the file and the remedy.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = os.path.realpath(path)
        self.file = LMDBFile(path)
        self.published = self.labels = self.paths = self.table = None
        try:
            header = self.file.get(HEADER)
            if header is None and self.file.find(LENGTH) is not None:
                self.published = PublishedLMDB(self.path, self.file)
                self.length, self.named = len(self.published), False
                self.classes = [str(i) for i in range(self.published.num_classes)]
            else:
                self._open(header)
        except (DamagedError, pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._error(f"damaged ({(str(error) or type(error).__name__).splitlines()[0]})") from None

    def __reduce__(self):
        return ImageDatabase, (self.path,)

    def _error(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}; copy it, or build it again: {rebuild(self.path)}")

    def _open(self, header: bytes | None) -> None:
        entries = self.file.entries
        if header is None:
            ours = not entries or self.file.find(key_of(0)) is not None
            raise self._error("half-written" if ours else "an LMDB file, but not an image database")
        self.header = json.loads(header)
        if self.header["format"] != FORMAT:
            raise self._error(f"an LMDB file of format {self.header['format']!r}, not an image database")
        if self.header["version"] > VERSION:
            version = self.header["version"]
            raise self._error(f"of format version {version}, and this program reads up to {VERSION}: update it")
        self.table, self.length = self._map_table(), self.header["count"]
        table = pa.ipc.open_file(self.table).read_all()
        if not table.num_rows == self.length == entries - 2:
            raise self._error(f"half-written or damaged: {entries - 2} of {self.length} images")
        self.classes = json.loads(table.schema.metadata[b"classes"])
        self.named = json.loads(table.schema.metadata[b"named"])
        self.rows = table
        label, size, crc32, path = (table[name].chunk(0) for name in ("label", "size", "crc32", "path"))
        self.labels, self.sizes, self.checksums = (a.to_numpy(zero_copy_only=True) for a in (label, size, crc32))
        self.paths = None if path.null_count else Paths(path)

    def _map_table(self) -> pa.Buffer:
        """Map the table, and read none of it."""
        found = self.file.find(TABLE)
        if found is None:
            raise self._error("half-written")
        offset, size = found
        view = memoryview(mmap.mmap(self.file.file.fileno(), 0, access=mmap.ACCESS_READ))[offset : offset + size]
        buffer = pa.py_buffer(view)
        return pa.py_buffer(bytes(view)) if buffer.address % 8 else buffer  # a small one lies anywhere in its page

    def check_table(self) -> None:
        """Read labels, paths and classes whole, and see that they are as they were written, and are possible."""
        if self.published is not None:
            return
        try:
            if not self._table_is_whole():
                raise DamagedError("the checksum of its table of labels and paths does not match")
            self.rows.validate(full=True)
            names = isinstance(self.classes, list) and all(isinstance(name, str) for name in self.classes)
            if not names or not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
                raise DamagedError("its labels and its classes do not fit")
        except (DamagedError, pa.ArrowException, ValueError, LookupError, TypeError) as error:
            raise self._error(f"damaged ({(str(error) or type(error).__name__).splitlines()[0]})") from None

    def _table_is_whole(self) -> bool:
        offset, size = self.file.find(TABLE)
        crc = 0
        for at in range(0, size, PART):  # read, because mapped pages would count as this process's
            crc = zlib.crc32(self.file.read(offset + at, min(PART, size - at)), crc)
        return crc == self.header["table"][2]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """Give the image's file, as it was, and its label."""
        if not 0 <= index < self.length:
            raise IndexError(f"{self.path}: no image {index} among {self.length}")
        if self.published is not None:
            return self.published[index]
        try:
            data = self.file.get(key_of(index))
        except DamagedError as error:
            raise self._error(f"{self.name(index)} cannot be read ({error})") from None
        if data is None or zlib.crc32(data) != self.checksums[index]:
            raise self._error(f"{self.name(index)} is {'missing' if data is None else 'not as it was written'}")
        return data, int(self.labels[index])

    def name(self, index: int) -> str:
        return f"image {index}" + ("" if self.paths is None else f" ({self.paths[index]})")

    def verify(self) -> list[str]:
        """List what is not as it was written; the published format has no checksums to find flipped bytes by."""
        if self.published is None and not self._table_is_whole():
            return ["its table of labels and paths"]
        bad = []
        for i in tqdm(range(len(self)), Path(self.path).name, unit=" images", disable=None):
            try:
                self[i]
            except InputError:
                bad.append(self.name(i))
        return bad
