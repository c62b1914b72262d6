"""Who is told, and how: the log, a webhook, a chat that takes what Slack takes, or a function of one's own."""

from __future__ import annotations

import importlib
import logging
import threading
from typing import TYPE_CHECKING

from extraction_dagster.errors.watch import NoticeError, NotifierError
from extraction_dagster.notify.post import post_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from extraction_dagster.notify.notice import RunFailure
    from extraction_dagster.settings import Settings

    Notifier = Callable[[RunFailure], None]

_log = logging.getLogger(__name__)
_POST_SECONDS = 15.0
_DELIVERY_SECONDS = 20.0  # a tick must end within a minute


def make_notifier(settings: Settings) -> Notifier | None:
    """The notifier that the settings ask for; None for none.

    Raises:
        NotifierError: A function of one's own can't be had.
    """
    kind = settings.notify
    url = settings.notify_url.get_secret_value() if settings.notify_url else ""
    if kind == "none":
        return None
    if kind == "log":
        return lambda failure: _log.error("%s", failure.text)
    if kind == "webhook":
        return lambda failure: post_json(url, failure.document(), seconds=_POST_SECONDS)
    if kind == "slack":
        return lambda failure: post_json(url, {"text": _slack(failure.text)}, seconds=_POST_SECONDS)
    return _of_ones_own(kind)


def deliver(notifier: Notifier, failure: RunFailure, *, seconds: float = _DELIVERY_SECONDS) -> None:
    """Tell, within a time: whatever a notifier does, its caller goes on.

    Raises:
        NoticeError: It failed, or did not end in time.
    """
    faults: list[str] = []

    def work() -> None:
        try:
            notifier(failure)
        except NoticeError as error:
            faults.append(error.why)
        except BaseException as error:  # noqa: BLE001 - also of a function that calls sys.exit
            # What a foreign error says may hold an address with its secret: its kind has to do.
            faults.append(f"{type(error).__name__} was raised")

    thread = threading.Thread(target=work, daemon=True, name="notifier")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise NoticeError(f"it did not end within {seconds:g} s")
    if faults:
        raise NoticeError(faults[0])


def _slack(text: str) -> str:
    """The three characters that Slack reads as its own."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _of_ones_own(path: str) -> Notifier:
    module_name, _, name = path.partition(":")
    try:
        found: object = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise NotifierError(path, f"it can't be imported ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise NotifierError(path, f"it is a {type(found).__name__}, expected a function")
    notifier: Notifier = found
    return notifier
