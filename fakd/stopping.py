"""Signals that stop a training: it finishes its step, keeps it and ends; a second stops at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# torchrun passes on what its processes may have received themselves: so close, two are one.
_ONE_SIGNAL = 1.0  # seconds
_NOTED = b"\nstopping after this step; a second signal stops at once\n"
_BEFORE = (
    "stopped before a step was done: there is nothing to keep, and the same command begins where "
    "this one did"
)
_AT_ONCE = "stopped at once; the same command goes on from the last checkpoint, if there is one"
_AFTER = "stopped after the last step, which is kept; the same command does the rest"


class Stopped(KeyboardInterrupt):
    """A signal ended a training; the message says what is kept.

    Args:
        message: what to say.
        number: of the signal; `code` is what a command then exits with.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.code = 128 + number


class StopSignals:
    """SIGINT and SIGTERM, while it is entered: both raise `Stopped`.

    In a thread that is not the main one, where no signal arrives, it does nothing.

    Args:
        is_speaking: whether a signal that is held is answered at once, on stderr.
    """

    def __init__(self, is_speaking: bool = True) -> None:
        self.received: int | None = None  # number of the one that is held
        self._is_speaking = is_speaking
        self._is_held = False
        self._since = 0.0
        self._message = _BEFORE
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                # What was started to outlast signals does, as jobs in the background do.
                if before not in (None, signal.SIG_IGN):
                    self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, before in self._handlers.items():
            signal.signal(number, before)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around all steps: inside, the first signal only sets `received`, to be asked for.

        Raises:
            Stopped: at the end, where one came too late to be asked for.
        """
        self._is_held, self._message = True, _AFTER
        try:
            yield
        finally:
            self._is_held = False
        if self.received is not None:
            raise self.stopped(_AFTER)

    def stopped(self, message: str) -> Stopped:
        """What to raise for a signal that this process, or another one, has received."""
        return Stopped(message, self.received or signal.SIGTERM)

    def _receive(self, number: int, _frame: object) -> None:
        if not self._is_held:
            raise Stopped(self._message, number)
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number, now
            if self._is_speaking:
                os.write(2, _NOTED)  # a handler may have interrupted any other writing
        elif now - self._since >= _ONE_SIGNAL:
            raise Stopped(_AT_ONCE, number)
