"""Stopping between two iterations when a signal asks for it, so that the state can be saved."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import TypeVar

T = TypeVar("T")
SIGNALS = {name: getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}
_NOTE = b"\nstopping after this iteration; a second signal stops at once\n"


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved its state; ``signal`` is the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.signal = number


class Interruption:
    """While this context is open, the first SIGINT, SIGTERM or SIGHUP waits for the end of the iteration.

    The second one raises KeyboardInterrupt at once. Signals that are ignored (nohup) or have a handler of somebody's
    own are left alone, as are all of them outside the main thread, where Python allows no handlers.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that came
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS.values():
                handler = signal.getsignal(number)
                if handler in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # a handler that is not Python's cannot be put back
                signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        if hasattr(signal, "SIGCHLD"):
            # A signal to all processes ends the loading ones too. torch's handler raises for that in the middle of an
            # iteration; without it, the next batch is what fails.
            self._before.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))
        os.write(2, _NOTE)  # a handler may run in the middle of print

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal came."""
        if self.number:
            raise Interrupted(self.number)

    def between(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; :class:`Interrupted` is raised before the next one if a signal came."""
        iterator = iter(batches)
        while True:
            self.check()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except RuntimeError:
                self.check()  # the signal went to the loading processes as well
                raise
            self.check()
            yield batch
