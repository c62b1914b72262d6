"""Errors of the cursor and its mirrors."""

from __future__ import annotations

from extraction_dagster.errors.base import ExtractionError


class CursorError(ExtractionError):
    """What the cursor store keeps can't be used."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"The stored cursor can't be used: {why}. Nothing was changed, and the rows still know what is done. "
            f"Look at it with 'extraction checkpoint show'; 'extraction checkpoint reset --storage cursor' "
            f"derives it from the rows once more."
        )


class MirrorError(ExtractionError):
    """A mirror of the checkpoint can't be reached."""

    def __init__(self, name: str, action: str, reason: str) -> None:
        super().__init__(
            f"Checkpoint mirror {name} can't be {action}: {reason}. The cursor store is not affected. "
            f"Restore access to it, or set EXTRACTION_CHECKPOINT_MIRROR=none."
        )


class LostCursorError(ExtractionError):
    """The cursor store is empty and the mirror, which would speak for it, is corrupt."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            f"The cursor store is empty, and checkpoint mirror {name} is corrupt: {why}. Nothing was started. Mend or "
            f"remove it, or say where to start with 'extraction checkpoint set ID' or 'extraction checkpoint reset'."
        )


class LegacyCheckpointError(ExtractionError):
    """The earlier script's checkpoint can't be imported."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(
            f"No checkpoint was imported from {where}: {why}. Nothing was changed. Name the right file, or say where "
            f"to start with 'extraction checkpoint set ID'."
        )
