"""Read image databases that the published folder2lmdb.py wrote, with a pyarrow that can no longer write them.

Keys are b"0", b"1", …, b"__len__", b"__keys__". A value is 16 bytes of header, then an Arrow stream with one column of
one row: the pair (image bytes, label), or the length. There are no class names; records are in ImageFolder's order.
"""

from typing import Any

import pyarrow as pa

from util.errors import InputError
from util.lmdb_file import DamagedError, LMDBFile, rebuild

HEADER = 16
LENGTH = b"__len__"
MOST_CLASSES = 100_000  # that a label is believed


class PublishedLMDB:
    """The records of one database, under a path that stays the same when the working folder changes.

    Raises InputError, naming the file, when it is damaged or of another format.
    """

    def __init__(self, path: str, file: LMDBFile) -> None:
        self.path, self.file = path, file
        self.length = self._value(LENGTH)
        if not isinstance(self.length, int) or self.length < 1:
            raise InputError(f"{path}: it says it holds {self.length} images; build it again: {rebuild(path)}")
        self.num_classes = MOST_CLASSES
        self.num_classes = self[self.length - 1][1] + 1  # they come in the classes' order

    def _value(self, key: bytes) -> Any:
        again = f"copy it, or build it again: {rebuild(self.path)}"
        try:
            value = self.file.get(key)
            if value is None:
                raise InputError(f"{self.path}: no {key.decode()} in it, so it is incomplete; {again}")
            table = pa.ipc.open_stream(pa.py_buffer(value[HEADER:])).read_all()
            table.validate(full=True)  # before its offsets are followed
            return table.column(0)[0].as_py()
        except (DamagedError, pa.ArrowException, OSError, LookupError, ValueError, TypeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(
                f"{self.path}: {key.decode()} is not as the published script writes it ({reason}); {again}"
            ) from None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """Give the image's bytes, as they were in its file, and its label."""
        value = self._value(str(index).encode())
        match value:
            case [bytes(data), int(label)] if 0 <= label < self.num_classes:
                return data, label
        raise InputError(f"{self.path}: record {index} is not an image and its label; build it again")
