"""See that an interrupt is not lost, whoever swallows it.

Ctrl+C, SIGTERM and *Terminate* in the UI raise an exception wherever the main thread happens to be. Where that is a
finalizer or the callback of a weak reference, no caller can catch the exception: Python prints "Exception ignored in"
and goes on. Some of Python's own functions clear it without a word, and a second signal may raise while the first is
being looked at. So each signal is noted twice, by code in which no signal can raise:

- Python's own handler in C writes each signal to a pipe; work asks at every record whether one has come
  (`check_interrupts`), and so does the end of a block.
- A dropped exception goes into a queue that is written in C, from which a thread delivers it again at once: long work
  on one record need not end first.

Source:
    `sys.unraisablehook` and `signal.set_wakeup_fd`; what is relied on is held by test_interrupts.py.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_DELAY_SECONDS = 0.05  # by then the finalizer has returned
_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})
_blocks: list[type[BaseException]] = []  # what interrupts the block that is under way, innermost last


class _Signals:
    """The signals that arrived since the outermost block began, as Python's handler in C noted them."""

    def __init__(self) -> None:
        self._read = self._write = -1
        self._former = -1
        self._has_come = False

    def begin(self) -> None:
        self._has_come = False
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._former = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def end(self) -> None:
        signal.set_wakeup_fd(self._former)
        for descriptor in (self._read, self._write):
            os.close(descriptor)
        self._read = self._write = -1

    def has_come(self) -> bool:
        with suppress(BlockingIOError, OSError):
            self._has_come = self._has_come or not _SIGNALS.isdisjoint(os.read(self._read, 4096))
        return self._has_come

    def forget_in_child(self) -> None:
        """A forked child's signals are its own: it must not write them into its parent's pipe."""
        if self._write >= 0:
            signal.set_wakeup_fd(-1)
            _blocks.clear()


_signals = _Signals()
os.register_at_fork(after_in_child=_signals.forget_in_child)


def check_interrupts() -> None:
    """Raise what interrupts the block that is under way if a signal has come, although it may have been swallowed.

    Called where work may stop, at every record; costs a system call. Other threads than the main one are never
    interrupted.
    """
    if _blocks and threading.current_thread() is threading.main_thread() and _signals.has_come():
        raise _blocks[-1]


def ignore_more_interrupts() -> None:
    """Ignore SIGINT and SIGTERM from here on, if a block is being ended by one: the process is about to end."""
    if not _blocks:
        return
    for _ in range(100):  # one that came just now raises once more
        with suppress(KeyboardInterrupt):
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            return


@contextmanager
def redeliver_dropped_interrupts(*interrupts: type[BaseException]) -> Iterator[None]:
    """End a block by an interrupt that came while it lasted, whoever dropped the exception.

    Args:
        interrupts: What the handler of SIGINT raises; the first is raised at the block's end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no signal is delivered to other threads
        return
    is_outermost, before = not _blocks, sys.unraisablehook
    dropped: queue.SimpleQueue[sys.UnraisableHookArgs | None] = queue.SimpleQueue()
    arguments = (dropped, before, interrupts)
    thread = threading.Thread(target=_deliver_again, args=arguments, name="interrupts", daemon=True)
    if is_outermost:
        _signals.begin()
    _blocks.append(interrupts[0])
    try:
        thread.start()
        sys.unraisablehook = dropped.put  # written in C: no signal can raise in it
        yield
        check_interrupts()
    finally:
        sys.unraisablehook = before
        dropped.put(None)
        if _blocks:
            _blocks.pop()
        if is_outermost:
            _signals.end()


def _deliver_again(
    dropped: queue.SimpleQueue[sys.UnraisableHookArgs | None],
    show: object,
    interrupts: tuple[type[BaseException], ...],
) -> None:
    """Send SIGINT to the main thread for each interrupt that was dropped; anything else is shown as ever."""
    main = threading.main_thread().ident
    while (found := dropped.get()) is not None:
        if not issubclass(found.exc_type, interrupts):
            if callable(show):
                show(found)
            continue
        time.sleep(_DELAY_SECONDS)
        if main is not None and _blocks:
            signal.pthread_kill(main, signal.SIGINT)
