"""Read image databases that the published folder2lmdb.py wrote, with a pyarrow that can no longer write them.

Keys are b"0", b"1", …, b"__len__", b"__keys__". A value is 16 bytes of header, then an Arrow stream with one column of
one row: the pair (image bytes, label), or the length. There are no class names; records are in ImageFolder's order.
"""

from typing import Any

import lmdb
import pyarrow as pa

from util.errors import InputError
from util.lmdb_file import read_transaction, rebuild

HEADER = 16
LENGTH = b"__len__"


class PublishedLMDB:
    """The records of one database, under a path that stays the same when the working folder changes.

    Raises InputError, naming the file, when it is damaged or of another format.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.length = self._value(LENGTH)
        if not isinstance(self.length, int) or self.length < 1:
            raise InputError(f"{path}: it says it holds {self.length} images; build it again: {rebuild(path)}")
        self.num_classes = self[self.length - 1][1] + 1

    def _value(self, key: bytes) -> Any:
        again = f"copy it, or build it again: {rebuild(self.path)}"
        try:
            value = read_transaction(self.path).get(key)
            if value is None:
                raise InputError(f"{self.path}: no {key.decode()} in it, so it is incomplete; {again}")
            return pa.ipc.open_stream(pa.py_buffer(bytes(value[HEADER:]))).read_all().column(0)[0].as_py()
        except (lmdb.Error, pa.ArrowInvalid, OSError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.path}: {key.decode()} is not as the published script writes it ({reason}); {again}"
            ) from None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """Give the image's bytes, as they were in its file, and its label."""
        value = self._value(str(index).encode())
        match value:
            case [bytes(data), int(label)] if label >= 0:
                return data, label
        raise InputError(f"{self.path}: record {index} is not an image and its label; build it again")
