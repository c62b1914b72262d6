"""Dagster's instance for commands that seldom need it: opened once a look at its storage is no answer."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from extraction_dagster.defs.instance.glance import Glance, glance
from extraction_dagster.settings import Settings

if TYPE_CHECKING:
    import dagster as dg

    from extraction_dagster.defs.instance.cursor_store import CursorStore

_LOOK_SECONDS = 0.5  # the questions of one tick are answered by one look


def ask(settings: Settings) -> Glance:
    """Look once, with the rate; where a look is no answer, Dagster is asked.

    Raises:
        HomeError, InstanceError, StorageError: What `open_instance` says.
    """
    if (seen := glance(settings, with_rate=True)) is not None:
        return seen
    from extraction_dagster.defs.instance.cursor_store import CursorStore
    from extraction_dagster.defs.instance.launching import open_instance
    from extraction_dagster.defs.instance.runs import active_runs, video_rate

    with open_instance(settings) as instance:
        cursor, active = CursorStore(instance).read(), len(active_runs(instance))
        return Glance(cursor, active, goes_on=True, videos_per_second=video_rate(instance))


@contextmanager
def opened_when_needed(settings: Settings, instance: "dg.DagsterInstance | None" = None) -> Iterator["LateInstance"]:
    """The instance of the settings, or one that is open already."""
    with ExitStack() as opened:
        yield LateInstance(instance, settings, opened)


class LateInstance:
    """A look at Dagster's storage as long as nothing goes on there; from then on its instance, which stays open."""

    def __init__(self, instance: "dg.DagsterInstance | None", settings: Settings, opened: ExitStack) -> None:
        self._instance, self._settings, self._opened = instance, settings, opened
        self._seen: tuple[float, Glance | None] = (0.0, None)

    @property
    def instance(self) -> "dg.DagsterInstance":
        """The instance, which stays open."""
        if self._instance is None:
            from extraction_dagster.defs.instance.launching import open_instance

            self._instance = self._opened.enter_context(open_instance(self._settings))
        return self._instance

    @property
    def store(self) -> "CursorStore":
        """The cursor store of the instance."""
        from extraction_dagster.defs.instance.cursor_store import CursorStore

        return CursorStore(self.instance)

    def at_rest(self, *, with_rate: bool = False) -> Glance | None:
        """What a look says where nothing goes on; None where the instance is to be asked."""
        if self._instance is not None:
            return None
        seen_at, seen = self._seen
        if with_rate or time.monotonic() - seen_at > _LOOK_SECONDS:
            seen = glance(self._settings, with_rate=with_rate)
            self._seen = time.monotonic(), seen
        return None if seen is None or seen.goes_on else seen

    def is_ticking(self) -> bool:
        """Whether a daemon ticks the sensor."""
        return self.at_rest() is None and self.store.is_ticking()

    def cursor(self) -> str | None:
        """The stored cursor."""
        seen = self.at_rest()
        return self.store.read() if seen is None else seen.cursor
