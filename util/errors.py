"""The ways in which a run ends early with one line instead of a traceback, and text for such lines."""


class InputError(Exception):
    """Something the user can fix (a flag, file, image, checkpoint, data layout): one line, exit status 2."""


class NonFiniteLossError(Exception):
    """Training diverged: one line that says where and what to try, exit status 1."""


class StoppedError(Exception):
    """A signal stopped the run, which can be resumed from there: one line, exit status 75 (EX_TEMPFAIL)."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(":. ")


def printable(name: str) -> str:
    """Return a name with ? for what is not UTF-8, which terminals and matplotlib refuse."""
    return name.encode(errors="replace").decode()
