"""Read single-file LMDB databases, from strangers too, in any process, without writing a byte beside them.

The library follows the page numbers in a file wherever they lead: a damaged or hostile one kills the process. So files
are written by the library, and read here: each page, node and size is checked before it is followed, and nothing is
mapped. A reader is one file descriptor, whose reads say where: forked processes may share it. The layout is that of
LMDB 0.9 and 1.0 on 64-bit little-endian machines (mdb.c: MDB_page, MDB_node, MDB_meta).
"""

import os
import struct
from bisect import bisect_left, bisect_right
from functools import lru_cache
from pathlib import Path

from util.errors import InputError

MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8  # flags of a page
BIG = 1  # flag of a node whose value has pages of its own
PAGE, NODE = 16, 8  # bytes of their headers
PAGE_SIZES = [1 << k for k in range(9, 17)]


class DamagedError(ValueError):
    """What a file holds is not what LMDB writes."""


def rebuild(path: str | Path) -> str:
    """Give the command that writes a database anew."""
    return f"python folder2lmdb.py --dir {os.path.dirname(path) or '.'} --overwrite"


class LMDBFile:
    """The main database of a file: `entries` of them, each a key and a value.

    Raises InputError, naming the file, when it is missing, a folder, no LMDB file or cut short; DamagedError in what
    is read later.
    """

    def __init__(self, path: str | Path) -> None:
        again = f"build it again: {rebuild(path)}"
        try:
            if os.path.isdir(path):
                raise InputError(
                    f"{path}: a folder, not an image database, which is one file; move it away, and {again}"
                )
            self.file = open(path, "rb", buffering=0)  # open as long as its reader is
            self.size = os.fstat(self.file.fileno()).st_size
        except FileNotFoundError:
            command = rebuild(path).removesuffix(" --overwrite")
            raise InputError(f"{path}: no such file; --use-lmdb reads what `{command}` writes") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be opened ({error.strerror})") from None
        if not self.size:
            raise InputError(f"{path}: not an image database but an empty file; {again}")
        try:
            self._read_meta()
        except DamagedError as error:
            raise InputError(f"{path}: not an image database, nor any other LMDB file ({error}); {again}") from None
        needed = (self.last + 1) * self.page_size
        if self.size < needed:
            raise InputError(f"{path}: cut short, {self.size} of at least {needed} bytes; copy it, or {again}")
        self._page = lru_cache(512)(self._read_page)

    def read(self, offset: int, size: int) -> bytes:
        """Give a part of the file. Raises DamagedError where the file ends before, or the device fails."""
        try:
            data = os.pread(self.file.fileno(), size, offset)
            while 0 < len(data) < size and (more := os.pread(self.file.fileno(), size - len(data), offset + len(data))):
                data += more
        except (OSError, OverflowError) as error:
            raise DamagedError(str(error)) from None
        if len(data) != size:
            raise DamagedError(f"it ends at {self.size} bytes, before {offset + size}")
        return data

    def _read_meta(self) -> None:
        """Find the newer of the two descriptions of the file, in its first two pages."""
        found = []
        for at in (0, *PAGE_SIZES):  # the second page begins where the first one ends
            data = self.read(at, 152) if at + 152 <= self.size else bytes(152)
            (flags,) = struct.unpack_from("<H", data, 10)
            magic, version, _, _, page_size = struct.unpack_from("<IIQQI", data, 16)
            if (
                magic == MAGIC
                and version == VERSION
                and flags & META
                and at in (0, page_size)
                and page_size in PAGE_SIZES
            ):
                found.append((struct.unpack_from("<Q", data, 144)[0], page_size, data))
        if not found:
            raise DamagedError("it does not begin as one")
        _, self.page_size, data = max(found, key=lambda meta: meta[0])
        _, _, self.depth, *_, self.entries, self.root, self.last = struct.unpack_from("<IHHQQQQQQ", data, 88)

    def _read_page(self, number: int) -> tuple[bytes, int]:
        """Give a page of the tree and the number of its nodes."""
        if not 2 <= number <= self.last:
            raise DamagedError(f"a page {number} of {self.last}")
        page = self.read(number * self.page_size, self.page_size)
        own, _, flags, lower, upper = struct.unpack_from("<QHHHH", page)
        if own != number or flags & ~0x10 not in (BRANCH, LEAF) or not PAGE <= lower <= upper <= self.page_size:
            raise DamagedError(f"page {number} is none of a tree")
        return page, (lower - PAGE) // 2

    def _node(self, page: bytes, index: int) -> tuple[int, int, int, bytes]:
        """Give of a node: where its data begin, its first number (32 bits), its flags and its key."""
        (at,) = struct.unpack_from("<H", page, PAGE + 2 * index)
        if at + NODE > len(page):
            raise DamagedError("a node beyond its page")
        low, high, flags, key_size = struct.unpack_from("<HHHH", page, at)
        start = at + NODE + key_size
        if start > len(page):
            raise DamagedError("a key beyond its page")
        return start, low | high << 16, flags, page[at + NODE : start]

    def find(self, key: bytes) -> tuple[int, int] | None:
        """Give where in the file a key's value begins, and its size; None where there is no such key."""
        number = self.root
        if number == 2**64 - 1:  # of an empty tree
            return None
        for _ in range(self.depth if self.depth < 32 else 0):
            page, count = self._page(number)
            if not count:
                raise DamagedError(f"page {number} is empty")
            if page[10] & LEAF:
                return self._find_in_leaf(number, page, count, key)
            after = bisect_right(range(1, count), key, key=lambda i, page=page: self._node(page, i)[3])
            _, low, high, _ = self._node(page, after)  # a branch's flags are the high bits of a page's number
            number = low | high << 32
        raise DamagedError("its tree has no leaves where they should be")

    def _find_in_leaf(self, number: int, page: bytes, count: int, key: bytes) -> tuple[int, int] | None:
        index = bisect_left(range(count), key, key=lambda i: self._node(page, i)[3])
        if index == count:
            return None
        start, size, flags, found = self._node(page, index)
        if found != key:
            return None
        if not flags & BIG:
            if start + size > len(page):
                raise DamagedError("a value beyond its page")
            return number * self.page_size + start, size
        if start + 8 > len(page):
            raise DamagedError("a value beyond its page")
        (first,) = struct.unpack_from("<Q", page, start)
        if not 2 <= first <= self.last:
            raise DamagedError(f"a page {first} of {self.last}")
        own, _, flags, pages = struct.unpack("<QHHI", self.read(first * self.page_size, PAGE))
        if own != first or not flags & OVERFLOW or not pages or first + pages - 1 > self.last:
            raise DamagedError(f"page {first} begins no value")
        if PAGE + size > pages * self.page_size:
            raise DamagedError(f"a value of {size} bytes in {pages} pages")
        return first * self.page_size + PAGE, size

    def get(self, key: bytes) -> bytes | None:
        """Give a key's value, or None."""
        found = self.find(key)
        return None if found is None else self.read(*found)
