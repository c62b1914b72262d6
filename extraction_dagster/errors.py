"""Every error that this project raises on purpose.

The caller passes facts, the class writes the sentence: the culprit, what was got, what was expected; what survives;
the fix. A class whose name a user may filter by (`extraction errors --type`) is part of the interface.
"""

from __future__ import annotations


class ExtractionError(Exception):
    """Base of the family.

    Attributes:
        permanent: Trying again can't help; the record is parked at once.
    """

    permanent: bool = False

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild the error from its finished sentence, so that it crosses process boundaries."""
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(kind: type[ExtractionError], args: tuple[object, ...], state: dict[str, object]) -> ExtractionError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class SettingsError(ExtractionError):
    """A setting is wrong, unknown, or does not fit another."""

    def __init__(self, setting: str, got: str, expected: str) -> None:
        """Name the setting, what was got and what was expected."""
        super().__init__(
            f"Setting {setting} is {got}, expected {expected}. Correct it in the environment or in .env; "
            f"'extraction doctor' lists every setting."
        )


class PartitionKeyError(ExtractionError):
    """A partition key is not a range of ids."""

    def __init__(self, key: str, why: str) -> None:
        """Name the key and what is wrong with it."""
        super().__init__(
            f"{key!r} is not a range of ids: {why}. Expected FIRST-LAST with both ends included, for example 1-1000."
        )


class RecordShapeError(ExtractionError):
    """A record between rooms was built from arrays that do not fit together; a bug, never a user's mistake."""

    def __init__(self, record: str, why: str, shapes: str) -> None:
        """Name the record, the rule and every shape."""
        super().__init__(f"{record} refused: {why}; got {shapes}.")
