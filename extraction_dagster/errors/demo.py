"""Errors of the demo."""

from __future__ import annotations

from extraction_dagster.errors.base import ExtractionError


class DemoEncoderError(ExtractionError):
    """The installed PyAV can't encode one of the demo's clips."""

    permanent = True

    def __init__(self, filename: str, encoders: tuple[str, ...], av_version: str) -> None:
        super().__init__(
            f"Demo clip {filename!r} can't be encoded: PyAV {av_version} has none of {', '.join(encoders)}. "
            f"Nothing was written for it. Install PyAV's own wheel: pip install --force-reinstall av."
        )


class DemoFolderError(ExtractionError):
    """The demo's folder can't be written."""

    permanent = True

    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            f"The demo can't write {path!r}: {why}. What was finished before stays. "
            f"Free the space or permit writing there, or set EXTRACTION_HOME to another folder, then run it again."
        )


class DemoTargetError(ExtractionError):
    """The demo was about to work on data that is not its own."""

    permanent = True

    def __init__(self, settings: tuple[str, ...], home: str) -> None:
        names = ", ".join(settings)
        super().__init__(
            f"The demo writes under {home!r} only, but {names} {'leads' if len(settings) == 1 else 'lead'} elsewhere. "
            f"Nothing was written. Unset {names} in the environment and in .env, or run the demo in another folder."
        )
