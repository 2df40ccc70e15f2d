"""Stop signals during training: after the step at hand, or within seconds wherever it hangs."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from datasets.loading import catch_stop_signals
from pipeline.command import Interrupted

PATIENCE = 4  # seconds, twice: to begin to end, and to end; launchers kill after 10 to 30


class StopSignals:
    """Notes the first stop signal while it is entered; more of them change nothing.

    A launcher like torchrun passes on a signal that its processes have received themselves.

    Attributes:
        signum: of the signal that has come.
    """

    signum: int | None = None

    def __init__(self, rescue: Callable[[], bool]):
        """`rescue` is called from another thread: the main one may hang in a library's call.

        It saves the run, for good, and returns True; or False if the main thread is about to end.
        """
        self._rescue, self._raises = rescue, False
        self._ended = threading.Event()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catches the signals; if the block does not end in time after one, ends the process."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        previous = catch_stop_signals(self._note)
        # The handlers wait for the main thread, the descriptor is written to at once.
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(reader, set(previous)), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._ended.set()
            signal.set_wakeup_fd(wakeup)
            for caught, handler in previous.items():
                signal.signal(caught, handler)
            os.write(writer, b"\0")  # ends the watcher: workers may hold the pipe open
            watcher.join()
            os.close(writer)
            os.close(reader)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal may end at any line, since it changes nothing."""
        self._raises = True
        try:
            self.check()
            yield
        finally:
            self._raises = False

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def _note(self, signum: int, _: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
        if self._raises:
            self._raises = False
            raise Interrupted(self.signum)

    def _watch(self, reader: int, signals: set[int]) -> None:
        """The main thread may be anywhere, also in code that does not let handlers run."""
        while (arrived := os.read(reader, 1)) != b"\0":
            if arrived[0] in signals:
                if not self._ended.wait(PATIENCE) and (
                    self._rescue() or not self._ended.wait(PATIENCE)
                ):
                    _end_process(arrived[0])
                return


def _end_process(signum: int) -> None:
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(128 + signum)
