"""Signals that wait for the end of an iteration."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pspnet_fast.training import Interrupted
from pspnet_fast.training.interruption import Interruption


def test_second_signal_stops_at_once() -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt) as error:
            os.kill(os.getpid(), signal.SIGINT)
        assert not isinstance(error.value, Interrupted)
        with pytest.raises(Interrupted):
            interruption.check()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_handlers_of_others_stay(handler: Any) -> None:
    before = signal.signal(signal.SIGHUP, handler)
    with Interruption():
        assert signal.getsignal(signal.SIGHUP) is handler
    signal.signal(signal.SIGHUP, before)


def test_no_handlers_outside_the_main_thread() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with Interruption() as interruption:
                interruption.check()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


def test_loading_process_that_the_signal_ended() -> None:
    def batches() -> Iterator[int]:
        yield 1
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    with Interruption() as interruption, pytest.raises(Interrupted):
        list(interruption.between(batches()))
    with Interruption() as interruption, pytest.raises(RuntimeError, match="a fault"):
        list(interruption.between(fault() for _ in range(1)))


def fault() -> None:
    raise RuntimeError("a fault")
