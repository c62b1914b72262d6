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


# The index room. A store's fault is no record's fault, so none of these parks a record, except PayloadError.


class PayloadError(ExtractionError):
    """A row's column can't become part of a point's payload."""

    permanent = True

    def __init__(self, record_id: int, column: str, why: str) -> None:
        """Name the record, the column and what is wrong with its value."""
        self.record_id = record_id
        super().__init__(
            f"Column {column!r} of record {record_id} can't be kept in a point's payload: {why}. Nothing was written "
            f"for it. Correct the value, or leave the column out of EXTRACTION_SOURCE_PAYLOAD_COLUMNS; then run "
            f"'extraction retry {record_id}'."
        )


class VectorNormError(ExtractionError):
    """A vector is not L2-normalised: its cosine would be meaningless."""

    def __init__(self, record_id: int, frame_number: int, norm: float) -> None:
        """Name the record, the frame and the norm."""
        self.record_id = record_id
        super().__init__(
            f"The vector of record {record_id}, frame {frame_number}, has norm {norm:.4g}, expected 1. Nothing was "
            f"written for its shard. Materialize frame_embeddings again for its range."
        )


class PointStoreError(ExtractionError):
    """The store of points could not do what was asked; its kinds say how and why."""


class StoreEngineError(PointStoreError):
    """The engine behind the store failed."""

    def __init__(self, operation: str, where: str, why: str) -> None:
        """Name the operation, the store and the engine's own words."""
        super().__init__(
            f"Could not {operation} in {where}: {why}. Rows are marked only after their points are verified, so "
            f"nothing is lost: the range is tried again."
        )


class StoreNotOpenError(PointStoreError):
    """A store was used before its collection was opened; a bug, never a user's mistake."""

    def __init__(self, operation: str, where: str) -> None:
        """Name the operation and the store."""
        super().__init__(
            f"Could not {operation} in {where}: no collection is open. Call ensure_collection or open_collection first."
        )


class StoreBusyError(PointStoreError):
    """Another process holds the embedded store."""

    def __init__(self, path: str, holder: str) -> None:
        """Name the folder and, as far as known, the holder."""
        super().__init__(
            f"The points in {path} are held by {holder}: the embedded store serves one process at a time, usually a "
            f"running qdrant_points step. Nothing was changed. Wait for it to end and try again, or set "
            f"EXTRACTION_QDRANT_URL to a server, which serves many."
        )


class StoreUnreadableError(PointStoreError):
    """The embedded store's files can't be read."""

    def __init__(self, path: str, why: str) -> None:
        """Name the file or folder and what is wrong with it."""
        super().__init__(
            f"The points in {path} can't be read: {why}. Frames, embeddings and the table are untouched, and points "
            f"can be rebuilt from them: move the folder aside, then run 'extraction reconcile --repair'."
        )


class StoreUnavailableError(PointStoreError):
    """The Qdrant server kept failing in a way that may pass."""

    def __init__(self, operation: str, url: str, attempts: int, why: str) -> None:
        """Name the operation, the server, the number of tries and the last reason."""
        super().__init__(
            f"Could not {operation} at {url} in {attempts} tries; the last one: {why}. No row was marked, so nothing "
            f"is lost: the range is tried again. Check that the server is up and reachable on its gRPC port."
        )


class StoreRefusedError(PointStoreError):
    """The Qdrant server refused a call; asking again would not help."""

    def __init__(self, operation: str, url: str, why: str) -> None:
        """Name the operation, the server and its reason."""
        super().__init__(
            f"The server at {url} refused to {operation}: {why}. No row was marked. Check EXTRACTION_QDRANT_URL, "
            f"EXTRACTION_QDRANT_API_KEY and the rights of that key."
        )


class CollectionMissingError(PointStoreError):
    """There is no such collection yet."""

    def __init__(self, name: str, where: str) -> None:
        """Name the collection and the store."""
        super().__init__(
            f"There is no collection {name!r} in {where} yet: no points were loaded. Run 'extraction launch "
            f"FIRST-LAST' on a range, or check EXTRACTION_COLLECTION_NAME and EXTRACTION_QDRANT_URL."
        )


class CollectionMismatchError(PointStoreError):
    """A collection holds vectors of another model, or of the same model with other settings."""

    def __init__(self, name: str, where: str, *, got: str, expected: str) -> None:
        """Name the collection and both kinds of vectors, each as dim and fingerprint."""
        super().__init__(
            f"Collection {name!r} in {where} holds vectors of {got}, but the settings give {expected}: their scores "
            f"could not be compared. Nothing was changed. Set EXTRACTION_MODEL back, or load the new vectors beside "
            f"the old ones: set EXTRACTION_COLLECTION_NAME to a new name, then run 'extraction backfill FIRST-LAST'."
        )


class CollectionInUseError(PointStoreError):
    """The collection that searches use can't be dropped."""

    def __init__(self, name: str, where: str) -> None:
        """Name the collection and the store."""
        super().__init__(
            f"Collection {name!r} in {where} is the one in use: it can't be dropped before another is published in "
            f"its place. Nothing was changed."
        )


class CollectionNameTakenError(PointStoreError):
    """The name that should stand for a collection is a collection itself."""

    def __init__(self, name: str, where: str) -> None:
        """Name the collection and the server."""
        super().__init__(
            f"{name!r} at {where} is a collection and no alias: another can't be put in its place. Nothing was "
            f"changed. Set EXTRACTION_COLLECTION_NAME to a new name, or remove that collection on the server."
        )


class PointsMissingError(PointStoreError):
    """The store does not hold the points that it acknowledged."""

    def __init__(self, when: str, *, expected: int, got: int, records: str) -> None:
        """Name the moment, both numbers and the records."""
        super().__init__(
            f"{got} points were found {when}, expected exactly {expected} ({records}). The rows were not marked, so "
            f"their range is tried again; 'extraction reconcile' compares the whole collection."
        )
