"""Signals that ask a run to stop, agreed on by all its processes; and what ends with its parent."""

import os
import signal
import threading
import time
from types import FrameType

from util import distributed
from util.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # the last is submitit's
NOTHING, SAVE, STOP = range(3)  # what is due
GRACE = 30.0  # seconds, torchrun's too


class Preemption:
    """Within this context a signal ends the run, at once, or where `deferring` at the next place that asks `due`.

    Every process of a run learns of it at the same place, whichever process the signal reached. Further signals
    change nothing: launchers and terminals send them twice. `interval` is the time between checkpoints, in minutes.
    """

    def __init__(self, interval: float | None = None) -> None:
        self.interval, self.saved_at = interval, time.monotonic()
        self.signal, self.deferring = 0, False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = not self.signal, self.signal or number
        if first and not self.deferring:
            raise PreemptedError(f"stopped by {self.name} before training began")

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name if self.signal else "another process's signal"

    def due(self) -> int:
        """Say what all processes have to do now: NOTHING, SAVE or STOP. All must ask at the same places."""
        late = self.interval is not None and time.monotonic() - self.saved_at >= 60 * self.interval
        return distributed.agree(STOP if self.signal else SAVE if late and distributed.is_primary() else NOTHING)

    def saved(self) -> None:
        self.saved_at = time.monotonic()


def shield_worker(_: int = 0) -> None:
    """Have a loader's worker outlive signals that a terminal or Slurm sends to all processes; its parent ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def follow_parent() -> None:
    """End this process when torchrun, its parent, is gone: as by SIGTERM, and a little later in any case."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
