"""Deliver an interrupt again that Python dropped.

Ctrl+C, SIGTERM and *Terminate* in the UI raise an exception wherever the main thread happens to be. Where that is a
finalizer or the callback of a weak reference, no caller can catch the exception: Python prints "Exception ignored
in" and goes on, and a run that was told to stop works through its whole range.

Source:
    `sys.unraisablehook`; that such exceptions arrive there is held by test_interrupts.py.
"""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_DELAY_SECONDS = 0.05  # by then the finalizer has returned


@contextmanager
def redeliver_dropped_interrupts(*interrupts: type[BaseException]) -> Iterator[None]:
    """Send SIGINT to the main thread again whenever one of these exceptions was dropped.

    Args:
        interrupts: What the handler of SIGINT raises.
    """
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, interrupts):
            _interrupt_soon()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _interrupt_soon() -> None:
    main = threading.main_thread().ident
    if main is None:
        return
    timer = threading.Timer(_DELAY_SECONDS, signal.pthread_kill, (main, signal.SIGINT))
    timer.daemon = True
    timer.start()
