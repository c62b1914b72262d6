"""Errors of the databases, and of getting a row's file: addresses are shown without passwords and signatures."""

from extraction_dagster.addresses import brief_address
from extraction_dagster.errors import SKIPPED, ExtractionError, PermanentError, one_line, some


class DatabaseUrlError(ExtractionError):
    """A database URL can't be used."""

    def __init__(self, setting: str, *, driver: str | None = None, odd: str = "") -> None:
        got = f"names the driver {driver!r}, which is not installed" if driver else odd or "is not a database URL"
        extra = " Install it with pip install 'extraction-dagster[mysql]'." if driver and "pymysql" in driver else ""
        super().__init__(f"""Setting {setting} {got}, expected for example postgresql://USER:PASSWORD@HOST:5432/DATABASE
            or sqlite:////path/to/file.db, or for the source alone mysql://USER:PASSWORD@HOST:3306/DATABASE, of MariaDB
            too (value not shown).{extra}""")


class SourceUnreachableError(ExtractionError):
    """A database can't be reached, read or written."""

    def __init__(self, what: str, url: str, reason: str) -> None:
        super().__init__(f"""Cannot {what} at {url}: {" ".join(reason.split())}. Nothing was changed. Check that the
            database runs and that its user has the rights, then try again.""")


class RightsError(SourceUnreachableError):
    """A database's user may not do what is needed."""

    def __init__(self, what: str, url: str, reason: str, *, grants: str = "") -> None:
        fix = f"Have somebody who may run: {grants} Or set" if grants else "Have the right granted, or set"
        ExtractionError.__init__(
            self,
            f"""Cannot {what} at {url}: {" ".join(reason.split())}. Nothing was changed. {fix} EXTRACTION_STATE_URL to
            a database that this user may write, and EXTRACTION_SOURCE_READ_ONLY=true where the source must not be
            written; 'extraction doctor' checks the rights.""",
        )


class MarksRefusedError(PermanentError):
    """The database took the UPDATE of a row's mark, and the row is unmarked all the same."""

    def __init__(self, table: str, record_ids: list[int], column: str) -> None:
        super().__init__(f"""The database took an UPDATE that sets {column!r} of {some(record_ids)} in {table!r}, and
            did not change them: a row-level security policy, a rule, a trigger or a view's INSTEAD OF trigger keeps
            this user from marking rows. Nothing more is done, for the rows would be processed for ever. Permit the
            UPDATE (PostgreSQL: CREATE POLICY … FOR UPDATE), or set EXTRACTION_SOURCE_READ_ONLY=true with
            EXTRACTION_STATE_URL, so that the ledger alone says what is done.""")


class SourceTableError(ExtractionError):
    """The source table is missing, or lacks what is needed of it."""

    def __init__(self, table: str, why: str, fix: str) -> None:
        super().__init__(f"Source table {table!r} can't be used: {why}. {fix}")


class PredicateError(ExtractionError):
    """EXTRACTION_SOURCE_PREDICATE can't be used."""

    def __init__(self, text: str, why: str, columns: list[str]) -> None:
        super().__init__(f"""Setting EXTRACTION_SOURCE_PREDICATE is {text!r}: {why}. Expected a condition such as
            is_downloaded AND NOT is_removed over the columns {", ".join(columns)}.""")


class StateError(ExtractionError):
    """The state tables belong to another source, or to another version of this project."""

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(f"The state tables can't be used: {why}. {fix}")


class EmptyRangeError(ExtractionError):
    """A range was asked for that holds no eligible row."""

    def __init__(self, key: str, table: str, extent: tuple[int, int] | None) -> None:
        rows = f"its eligible rows have ids {extent[0]} to {extent[1]}" if extent else "it has no eligible row at all"
        super().__init__(f"""Range {key} holds no eligible row of {table!r}: {rows}. Nothing was done. Choose a range
            that overlaps the table's ids, or wait until rows arrive.""")


class RecordUnknownError(ExtractionError):
    """Nothing is known of a record that was asked for."""

    def __init__(self, record_id: int, table: str, *, is_there: bool) -> None:
        why = "is not eligible (EXTRACTION_SOURCE_PREDICATE)" if is_there else "is not there"
        super().__init__(f"""Record {record_id} of {table!r} {why}, and the ledger never knew it. Nothing was changed.
            'extraction status' shows the first and the last id.""")


class UnreadableRowError(ExtractionError):
    """A row holds a value that can't be read or used."""

    def __init__(self, table: str, record_id: int, column: str, why: str, *, expected: str) -> None:
        super().__init__(f"""Column {column!r} of record {record_id} in {table!r} can't be used: {one_line(why, 200)};
            expected {expected}. {SKIPPED} Correct the value; the record is tried again later, and with
            'extraction retry {record_id}' once it is parked.""")


class SchemeError(PermanentError):
    """A row's address has a scheme that is not read."""

    def __init__(self, uri: str, scheme: str) -> None:
        super().__init__(f"""Address {brief_address(uri)!r} has scheme {scheme!r}, expected a path, file://, https://,
            s3:// or gs://. Correct the row, or the setting EXTRACTION_SOURCE_URI_COLUMN or
            EXTRACTION_SOURCE_URI_TEMPLATE.""")


class FileForbiddenError(PermanentError):
    """A row's address points where nothing may be read, or at what is no regular file."""

    def __init__(self, uri: str, why: str, *, roots: str) -> None:
        super().__init__(f"""Address {brief_address(uri)!r} is refused: {why}. Expected a regular file under one of
            {roots}. Correct the row, or add the folder to EXTRACTION_ALLOWED_ROOTS.""")


class FileUnavailableError(ExtractionError):
    """A row's file is missing, empty or unreadable now; it may still arrive."""

    def __init__(self, uri: str, why: str) -> None:
        super().__init__(f"""File {brief_address(uri)!r} is not available: {why}, expected a readable file with content.
            The record is tried again later; the range goes on.""")


class AddressForbiddenError(PermanentError):
    """A row's address leads to a server, bucket or network that may not be read."""

    def __init__(self, uri: str, why: str, fix: str) -> None:
        super().__init__(f"Address {brief_address(uri)!r} is refused: {why}. Nothing was read from it. {fix}")


class FileRefusedError(PermanentError):
    """A server or bucket said for good that it has no such file, or not for us."""

    def __init__(self, uri: str, answer: str) -> None:
        super().__init__(f"""File {brief_address(uri)!r} can't be had: the answer was {answer}. {SKIPPED} Correct the
            row or the rights, then retry the record.""")


class FileTooLargeError(PermanentError):
    """A file is larger than may be downloaded."""

    def __init__(self, uri: str, *, got_bytes: int, max_bytes: int) -> None:
        super().__init__(f"""File {brief_address(uri)!r} has {got_bytes} bytes or more, expected at most {max_bytes}. It
            was not kept; the range goes on. Raise EXTRACTION_MAX_FILE_BYTES (and EXTRACTION_CACHE_BYTES) if it is
            meant.""")


class FileEncodedError(PermanentError):
    """A server packed a file although it was asked not to; unpacking could fill any disk."""

    def __init__(self, uri: str, encoding: str) -> None:
        super().__init__(f"""File {brief_address(uri)!r} comes with Content-Encoding {one_line(encoding, 100)!r},
            expected the file as it is: packed answers are never unpacked. {SKIPPED} Correct the server.""")


class DownloadTimeoutError(ExtractionError):
    """A download took longer than allowed."""

    def __init__(self, uri: str, *, seconds: float) -> None:
        super().__init__(f"""File {brief_address(uri)!r} did not arrive within {seconds:g} s. What arrived is kept, and
            the next try goes on from there where the server allows it; the range goes on. Raise
            EXTRACTION_FETCH_TIMEOUT_SECONDS if the files are large or the network slow.""")


class FetchSetupError(ExtractionError):
    """Files can't be fetched as things are set up here: no record is to blame, so the run ends."""


class FetchExtraMissingError(FetchSetupError):
    """A bucket is to be read whose package is not installed."""

    def __init__(self, scheme: str, package: str) -> None:
        super().__init__(f"""EXTRACTION_ALLOWED_BUCKETS names a {scheme}:// bucket, and the package {package} is not
            installed. Nothing was read. Install the extra: pip install 'extraction-dagster[{scheme}]'.""")


class FetchCredentialsError(FetchSetupError):
    """The credentials for a bucket are missing, expired or wrong."""

    def __init__(self, uri: str, said: str) -> None:
        super().__init__(f"""The credentials for {brief_address(uri)!r} are not accepted: {said}. No record is to blame,
            and none was marked. Set them as the store's own tools do (AWS_… variables or ~/.aws,
            GOOGLE_APPLICATION_CREDENTIALS), then run the range again.""")


class DownloadCacheError(FetchSetupError):
    """The cache of downloads can't be used."""

    def __init__(self, folder: str, why: str) -> None:
        super().__init__(f"""The cache of downloads in {folder!r} can't be used: {why}. No record is to blame, and none
            was marked. Make room there, or change EXTRACTION_CACHE_BYTES or EXTRACTION_HOME; then run the range
            again.""")
