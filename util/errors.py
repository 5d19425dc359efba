"""The two ways in which a run ends early with one line instead of a traceback."""


class InputError(Exception):
    """What a person can mend (a flag, file, image, checkpoint, data layout): one line, exit status 2."""


class NonFiniteLossError(Exception):
    """Training diverged: one line that says where and what to try, exit status 1."""
