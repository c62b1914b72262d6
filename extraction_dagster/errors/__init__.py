"""Every error that this project raises on purpose, by the room that raises it; here those of all rooms and of the demo.

The caller passes facts, the class writes the sentence: the culprit, what was got, what was expected; what survives;
the fix. A class whose name a user may filter by (`extraction errors --type`) is part of the interface. A sentence is
written over several lines, the later ones indented by twelve: each break becomes one space.
"""

SKIPPED = "Nothing was written for it; the range goes on."
_BREAK = "\n" + 12 * " "


class ExtractionError(Exception):
    """Base of the family.

    Attributes:
        permanent: Trying again can't help; the record is parked at once.
    """

    permanent: bool = False

    def __init__(self, sentence: str = "") -> None:
        super().__init__(sentence.replace(_BREAK, " "))

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild the error from its finished sentence, so that it crosses process boundaries."""
        return (Exception.__new__, (type(self), *self.args), self.__dict__)


class PermanentError(ExtractionError):
    """An error that trying again can't help."""

    permanent = True


def one_line(said: str, most: int = 500) -> str:
    """Text from a foreign file, made safe for a terminal: no line break, no escape sequence, cut to a length."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in said[:most])


class SettingsError(ExtractionError):
    """A setting is wrong, unknown, or does not fit another."""

    def __init__(self, setting: str, got: str, expected: str) -> None:
        super().__init__(f"""Setting {setting} is {got}, expected {expected}. Correct it in the environment or in .env;
            'extraction doctor --all' lists every setting.""")


class PartitionKeyError(ExtractionError):
    """A partition key is not a range of ids."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"""{key!r} is not a range of ids: {why}. Expected FIRST-LAST with both ends included, for
            example 1-1000.""")


class RecordShapeError(ExtractionError):
    """A record between rooms was built from arrays that do not fit together; a bug, never a user's mistake."""

    def __init__(self, record: str, why: str, shapes: str) -> None:
        super().__init__(f"{record} refused: {why}; got {shapes}.")


def some(record_ids: list[int]) -> str:
    """Name a few of many records: `records 1, 2, 3, 4, 5, …`."""
    shown = ", ".join(map(str, record_ids[:5]))
    return f"records {shown}{', …' if len(record_ids) > 5 else ''}"  # noqa: PLR2004 - as many as shown


class DemoEncoderError(PermanentError):
    """The installed PyAV can't encode one of the demo's clips."""

    def __init__(self, filename: str, encoders: tuple[str, ...], av_version: str) -> None:
        super().__init__(f"""Demo clip {filename!r} can't be encoded: PyAV {av_version} has none of
            {", ".join(encoders)}. Nothing was written for it. Install PyAV's own wheel: pip install --force-reinstall
            av.""")


class DemoFolderError(PermanentError):
    """The demo's folder can't be written."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"""The demo can't write {path!r}: {why}. What was finished before stays. Free the space or
            permit writing there, or set EXTRACTION_HOME to another folder, then run it again.""")


class DemoTargetError(PermanentError):
    """The demo was about to work on data that is not its own."""

    def __init__(self, settings: tuple[str, ...], home: str) -> None:
        names = ", ".join(settings)
        super().__init__(f"""The demo writes under {home!r} only, but {names}
            {"leads" if len(settings) == 1 else "lead"} elsewhere. Nothing was written. Unset {names} in the environment
            and in .env, or run the demo in another folder.""")
