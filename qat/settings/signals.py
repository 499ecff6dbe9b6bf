"""Signals that ask a program to stop: SIGTERM of a scheduler, SIGHUP of a terminal that closes.

They end it as Ctrl-C does, by an exception that every ``finally`` sees on its way out.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qat.errors import PreemptedError
from qat.settings import machine

STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def stop_now(signum: int, frame: object = None) -> None:
    raise PreemptedError(signum)


@contextmanager
def when_asked_to_stop(call: Callable[[int, object], None] = stop_now) -> Iterator[None]:
    """What a signal that asks to stop does inside. One that is ignored stays so: that is nohup.

    A rank that waits for others runs no Python, and would not stop by it: it is ended as ever, but
    where ``call`` has something to save.
    """
    before = {}
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and (machine.world_size() == 1 or call is not stop_now):
        before = {number: signal.getsignal(number) for number in STOPPING}
    heard = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in heard:
        signal.signal(number, call)
    try:
        yield
    finally:
        for number, old in heard.items():
            signal.signal(number, old)
