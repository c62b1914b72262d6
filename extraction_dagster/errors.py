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


# Embedding


class EmbeddingModelError(ExtractionError):
    """No model goes by the name that was set."""

    permanent = True

    def __init__(self, name: str, why: str, available: str) -> None:
        """Name the model, what is wrong with the name, and the models there are."""
        super().__init__(
            f"No embedding model {name!r}: {why}. Available: {available}. Set EXTRACTION_MODEL to one of them."
        )


class ModelFilesError(ExtractionError):
    """A model's files are missing, damaged or refused; nothing was embedded with them."""

    permanent = True

    def __init__(self, model: str, where: str, got: str, expected: str, fix: str) -> None:
        """Name the model, its files, what was found and what was expected, and the fix."""
        super().__init__(
            f"Model {model!r} can't be loaded from {where}: got {got}, expected {expected}. Nothing was written. {fix}"
        )


class EmbeddingDeviceError(ExtractionError):
    """The device that was set is not there."""

    permanent = True

    def __init__(self, device: str, available: str) -> None:
        """Name the device that was set and those that are there."""
        super().__init__(
            f"Device {device!r} is not available, this machine's torch sees: {available}. "
            f"Set EXTRACTION_DEVICE to one of them, or to auto."
        )


class EmbeddingMemoryError(ExtractionError):
    """Not even one frame fits into the device's memory."""

    def __init__(self, model: str, device: str, said: str) -> None:
        """Name the model, the device and what the allocator said."""
        super().__init__(
            f"Model {model!r} ran out of memory on {device} with a batch of 1 frame, after halving it down to that "
            f"({said}). Finished shards are kept. Free memory on {device}, or choose a smaller EXTRACTION_MODEL or "
            f"another EXTRACTION_DEVICE, then run the range again."
        )


class ModelOutputError(ExtractionError):
    """A model gave something else than one vector per frame; a fault of the model, never of a record."""

    permanent = True

    def __init__(self, model: str, got: str, expected: str) -> None:
        """Name the model, the shape and dtype that it gave and those expected."""
        super().__init__(f"Model {model!r} gave {got}, expected {expected}. Finished shards are kept.")


class InvalidVectorError(ExtractionError):
    """A frame's vector can't be searched: it has NaN, an infinite value, or no length."""

    def __init__(self, record_id: int, frame_number: int, model: str, got: str) -> None:
        """Name the record, the frame, the model and what is wrong with the vector."""
        super().__init__(
            f"Frame {frame_number} of record {record_id} got a vector with {got} from model {model!r}, expected finite "
            f"values and a length above zero. No vector of the record was kept; the range goes on. "
            f"'extraction retry {record_id}' tries it again."
        )


class StoredFrameError(ExtractionError):
    """A frame in the frame store is no readable JPEG."""

    def __init__(self, record_id: int, frame_number: int, said: str) -> None:
        """Name the record, the frame and what the JPEG library said."""
        super().__init__(
            f"Stored frame {frame_number} of record {record_id} is no readable JPEG ({said}), expected what the decode "
            f"stage wrote. No vector of the record was kept; the range goes on. Decode it again, then "
            f"'extraction retry {record_id}'."
        )


class EmbeddingShardError(ExtractionError):
    """A file is no embedding shard of this store, or it is damaged."""

    def __init__(self, path: str, got: str, expected: str) -> None:
        """Name the file, what it holds and what was expected."""
        super().__init__(
            f"Embedding shard {path!r} can't be read: got {got}, expected {expected}. Other shards are not touched. "
            f"Delete the file and run its range again: it is made anew from the stored frames."
        )


class QueryImageError(ExtractionError):
    """A file given to search is no image that can be embedded."""

    permanent = True

    def __init__(self, path: str, got: str, expected: str) -> None:
        """Name the file, what it is and what was expected."""
        super().__init__(f"Image {path!r} can't be searched for: got {got}, expected {expected}.")
