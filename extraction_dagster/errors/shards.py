"""Errors of stored frames and vectors."""

from __future__ import annotations

from extraction_dagster.errors.base import ExtractionError


class StoredFrameError(ExtractionError):
    """A frame in the frame store is no readable JPEG."""

    def __init__(self, record_id: int, frame_number: int, said: str) -> None:
        super().__init__(
            f"Stored frame {frame_number} of record {record_id} is no readable JPEG ({said}), expected what the decode "
            f"stage wrote. No vector of the record was kept; the range goes on. Decode it again, then "
            f"'extraction retry {record_id}'."
        )


class ShardError(ExtractionError):
    """A shard is gone or damaged."""


class EmbeddingShardError(ShardError):
    """A file is no embedding shard of this store, or it is damaged."""

    def __init__(self, path: str, got: str, expected: str) -> None:
        super().__init__(
            f"Embedding shard {path!r} can't be read: got {got}, expected {expected}. Other shards are not touched. "
            f"Delete the file and run its range again: it is made again from the stored frames."
        )


class FrameShardError(ShardError):
    """A frame shard can't be read back."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            f"Frame shard {path!r} can't be read: {why}. Its records are to be decoded again: remove the file and "
            f"materialize video_frames for its range."
        )


class ShardStoreError(ExtractionError):
    """Shards can't be read or written where they are kept."""

    what: str
    setting: str

    def __init__(self, address: str, why: str) -> None:
        super().__init__(
            f"The {self.what} in {address!r} can't be reached: {why}. No record is to blame, and what was written is "
            f"kept. Correct {self.setting}, or the store's own configuration (AWS_… variables, say); then run "
            f"the range again."
        )


class FrameStoreError(ShardStoreError):
    """Frames can't be read or written where they are kept."""

    what, setting = "frames", "EXTRACTION_FRAMES_URI"


class EmbeddingStoreError(ShardStoreError):
    """Vectors can't be read or written where they are kept."""

    what, setting = "vectors", "EXTRACTION_EMBEDDINGS_URI"


class FramesExportError(ExtractionError):
    """Frames can't be exported."""

    def __init__(self, path: str, why: str, *, survives: str) -> None:
        super().__init__(f"Frames can't be exported to {path!r}: {why}. {survives}")
