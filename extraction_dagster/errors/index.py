"""Errors of the point store. Only PayloadError parks a record: when the store fails, no record is to blame."""

from extraction_dagster.errors import ExtractionError, PermanentError, one_line, some


class PayloadError(PermanentError):
    """A row's column can't become part of a point's payload."""

    def __init__(self, record_id: int, column: str, why: str) -> None:
        self.record_id = record_id
        super().__init__(f"""Column {column!r} of record {record_id} can't be kept in a point's payload: {why}. Nothing
            was written for it. Correct the value, or leave the column out of EXTRACTION_SOURCE_PAYLOAD_COLUMNS; then
            run 'extraction retry {record_id}'.""")


class PointRefusedError(PermanentError):
    """A store that takes the points of other records does not take those of this one."""

    def __init__(self, record_id: int, why: str) -> None:
        super().__init__(f"""The points of record {record_id} are refused: {one_line(why)} Nothing else was kept back by
            it. Correct the row's values, the payload columns first of all; then run 'extraction retry {record_id}'.""")


class VectorNormError(ExtractionError):
    """A vector is not L2-normalised: its cosine would be meaningless."""

    def __init__(self, record_id: int, frame_number: int, norm: float) -> None:
        self.record_id = record_id
        super().__init__(f"""The vector of record {record_id}, frame {frame_number}, has norm {norm:.4g}, expected 1:
            its shard is damaged. Nothing was written for the record; the range goes on. 'extraction retry {record_id}'
            embeds it again.""")


class PointStoreError(ExtractionError):
    """The store of points could not do what was asked; its subclasses say how and why.

    Attributes:
        may_be_content: What was to be written may be to blame, rather than the store.
    """

    may_be_content: bool = False


class StoreEngineError(PointStoreError):
    """The engine behind the store failed."""

    def __init__(self, operation: str, where: str, why: str, *, may_be_content: bool = False) -> None:
        self.may_be_content = may_be_content
        super().__init__(f"""Could not {operation} in {where}: {why}. Rows are marked only after their points are
            verified, so nothing is lost: the range is tried again.""")


class StoreNotOpenError(PointStoreError):
    """A store was used before its collection was opened; a bug, never a user's mistake."""

    def __init__(self, operation: str, where: str) -> None:
        super().__init__(f"""Could not {operation} in {where}: no collection is open. Call ensure_collection or
            open_collection first.""")


class StoreBusyError(PointStoreError):
    """Another process holds the embedded store."""

    def __init__(self, path: str, holder: str) -> None:
        super().__init__(f"""The points in {path} are held by {holder}: the embedded store serves one process at a time,
            usually a running qdrant_points step. Nothing was changed. Wait for it to end and try again, or set
            EXTRACTION_QDRANT_URL to a server, which serves many.""")


class StoreUnreadableError(PointStoreError):
    """The embedded store's files can't be read."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"""The points in {path} can't be read: {why}. Frames, embeddings and the table are untouched,
            and points can be rebuilt from them: move the folder aside, then run 'extraction reconcile --repair'.""")


class StoreUnavailableError(PointStoreError):
    """The Qdrant server kept failing in a way that is usually temporary."""

    def __init__(self, operation: str, where: str, attempts: int, why: str, *, seconds: float) -> None:
        super().__init__(f"""Could not {operation} at {where} in {attempts} tries; the last one: {why}. It was asked
            for {seconds:.0f} s (EXTRACTION_QDRANT_RETRY_SECONDS). No row was marked, so nothing is lost: the range is
            tried again. Check that the server is up and reachable on its gRPC port.""")


class StoreRefusedError(PointStoreError):
    """The Qdrant server refused a call; asking again would not help."""

    def __init__(self, operation: str, where: str, why: str, fix: str = "", *, may_be_content: bool = False) -> None:
        self.may_be_content = may_be_content
        super().__init__(f"""The server at {where} refused to {operation}: {why}. No row was marked.
            {fix or "Check EXTRACTION_QDRANT_URL, EXTRACTION_QDRANT_API_KEY and the rights of that key."}""")


class StoreLimitError(StoreRefusedError):
    """A call is beyond a limit that the server keeps, which it names."""

    def __init__(self, operation: str, where: str, why: str, *, may_split: bool) -> None:
        self.may_split = may_split
        super().__init__(
            operation, where, why, "It is a limit of the server's; docs/collection.md says what each of them does."
        )


class CollectionRightsError(PointStoreError):
    """A name is an alias that can't be followed to a collection of ours."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(f"""{name!r} at {where} is an alias whose collection the key may not see, or that stands
            where a collection should: points would follow it into another model's collection. Nothing was changed.
            Give the key of EXTRACTION_QDRANT_API_KEY the right to read and write the collections '{name}-...' as
            well.""")


class CollectionUnnamedError(PointStoreError):
    """Collections of a name hold points, and the name stands for none of them."""

    def __init__(self, name: str, where: str, *, there: list[str]) -> None:
        chosen = there[0].removeprefix(f"{name}-")
        super().__init__(f"""The name {name!r} at {where} stands for no collection, though there are {", ".join(there)}
            with points: the alias was removed, or they were restored from a snapshot, which has none. Nothing was
            changed. Run 'extraction collection publish {chosen}' for the one to be used, with --force if not every
            record is in it yet.""")


class CollectionUnfitError(PointStoreError):
    """A collection was made by something else, in another way."""

    def __init__(self, name: str, where: str, *, got: str, expected: str) -> None:
        super().__init__(f"""Collection {name!r} at {where} has {got}, expected {expected}: something else made it.
            Nothing was read or changed. Set EXTRACTION_COLLECTION_NAME to a name of its own, or correct it on the
            server.""")


class CollectionMissingError(PointStoreError):
    """The collection does not exist, or not yet."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(f"""There is no collection {name!r} in {where}; 'extraction collection list' shows those that
            exist. The first one comes with the first points: run 'extraction launch FIRST-LAST' on a range, or check
            EXTRACTION_COLLECTION_NAME and EXTRACTION_QDRANT_URL.""")


class CollectionMismatchError(PointStoreError):
    """A collection holds vectors of another model, or of the same model with other settings."""

    def __init__(self, name: str, where: str, *, got: str, expected: str) -> None:
        super().__init__(f"""Collection {name!r} in {where} holds vectors of {got}, but the settings give {expected}:
            their scores could not be compared. Nothing was changed. Set EXTRACTION_MODEL back, or change the model
            without a pause: 'extraction collection stage', then 'extraction launch FIRST-LAST' for every range, then
            'extraction collection publish'; searches use the old one until then.""")


class ForeignCollectionError(PointStoreError):
    """A collection holds points of another source table."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(f"""Collection {name!r} in {where} holds points of another source table, or of this one at
            another address: their records would be taken for each other's. Nothing was read or changed. If the
            database moved, run 'extraction init --take-over'. Else set EXTRACTION_COLLECTION_NAME to a name of its own
            for each source table, or EXTRACTION_SOURCE_URL and EXTRACTION_SOURCE_TABLE to the table that it belongs
            to.""")


class CollectionInUseError(PointStoreError):
    """The collection that searches use can't be dropped."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(f"""Collection {name!r} in {where} is the one in use: it can't be dropped before another is
            published in its place. Nothing was changed.""")


class CollectionNameTakenError(PointStoreError):
    """The name that should stand for a collection is a collection itself."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(f"""{name!r} at {where} is a collection, not an alias: another can't be put in its place.
            Nothing was changed. Set EXTRACTION_COLLECTION_NAME to a new name, or remove that collection on the
            server.""")


class PointsMissingError(PointStoreError):
    """The store does not hold the points that it acknowledged."""

    def __init__(self, when: str, *, expected: int, got: int, records: str) -> None:
        super().__init__(f"""{got} points were found {when}, expected exactly {expected} ({records}). The rows were not
            marked, so their range is tried again; 'extraction reconcile' compares the whole collection.""")


class GalleryError(ExtractionError):
    """The gallery can't be written."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"Gallery {path!r} can't be written: {why}. Choose another file for --html.")


class CollectionNotReadyError(PointStoreError):
    """A collection that should be put in use lacks records."""

    def __init__(self, name: str, where: str, *, missing: int, records: int, ranges: str) -> None:
        super().__init__(f"""Collection {name!r} in {where} can't be put in use yet: {missing} of {records} records that
            are done are not in it, or not with all their points ({ranges}). Nothing was changed. Run 'extraction launch
            FIRST-LAST' on these ranges, then publish again; --force publishes it as it is.""")


class ExportError(ExtractionError):
    """Points can't be exported."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"Points can't be exported to {path!r}: {why}. No file was left behind.")


class PointFileError(ExtractionError):
    """A file of points can't be read, or holds what no export of ours would."""

    def __init__(self, path: str, where: str, why: str, fix: str = "", *, written: int = 0) -> None:
        self._facts = (path, where, why, fix)
        kept = f"{written} points before it were written and stay" if written else "Nothing was written"
        fix = fix or "Export the points again with 'extraction points export'."
        super().__init__(f"""Points can't be imported from {path!r}{f", {where}" if where else ""}: {why}. {kept}.
            {fix}""")

    def after(self, written: int) -> "PointFileError":
        """The same, of a file that changed after it was checked."""
        return PointFileError(*self._facts, written=written)


class PointsChangedError(PointStoreError):
    """Points that were verified when their rows were marked are not what is there at the end of the same run."""

    def __init__(self, key: str, *, lost: int, surplus: int, record_ids: list[int]) -> None:
        super().__init__(f"""Range {key}: {lost} verified points are gone and {surplus} are too many
            ({some(record_ids)}): something else writes into the collection. These records were made pending, so their
            range is run again; 'extraction reconcile' compares the whole collection.""")
