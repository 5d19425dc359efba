"""Signals that ask a run to stop (SIGTERM, Ctrl-C, Slurm's), answered after the update that is under way."""

import atexit

# registers multiprocessing's exit function before ours, so that atexit, last in first out, runs ours first
import multiprocessing.util
import os
import signal
import time
from types import FrameType

from util import distributed

# what a process asks of all; the largest wins
CONTINUE, SAVE, STOP = range(3)

# Windows has the first two
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]

# this process's first stop signal, 0 if there was none; it outlives the context for run_with_submitit.py
received = 0


class StopSignal:
    """Within this context stop signals are remembered instead of ending the process.

    `interval` is the time between checkpoints within an epoch, in minutes.
    """

    def __init__(self, interval: float | None = None) -> None:
        self.interval = interval
        self.saved_at = time.monotonic()

    def __enter__(self) -> "StopSignal":
        global received
        received = 0
        self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        global received
        # launchers and terminals may send a second one
        if received:
            return
        received = number
        if distributed.is_primary():
            # not print, which is not reentrant: the signal may have interrupted one
            os.write(2, f"{signal.Signals(number).name}: the run stops as soon as it can be saved\n".encode())

    def should_stop(self) -> bool:
        """Return whether this process was asked to stop; others may not know yet."""
        return bool(received)

    def agree(self) -> int:
        """Return what all processes do now: CONTINUE, SAVE or STOP. All must call this after the same update."""
        # a signal may come to some processes only, and their clocks differ
        request = CONTINUE
        if self.interval is not None and time.monotonic() - self.saved_at >= 60 * self.interval:
            request = SAVE
        if received:
            request = STOP
        request = distributed.all_reduce_max(request)
        if request:
            self.saved_at = time.monotonic()
        return request

    @property
    def name(self) -> str:
        """Return the signal that this process received, in words for a message."""
        return signal.Signals(received).name if received else "a signal to another process"


def ignore_signals(_: int = 0) -> None:
    """Ignore stop signals; called in each worker of a loader, with its number."""
    # a terminal sends them to all processes, and the main process still needs batches for its update
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def kill_workers() -> None:
    """End the workers of a loader that is still alive at exit."""
    # Python itself would send SIGTERM, which they ignore, and wait for them forever
    if hasattr(signal, "SIGCHLD"):
        # torch's handler would raise an error for each of them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
