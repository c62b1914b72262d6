"""Errors of getting a row's file. Addresses are shown without passwords and signatures."""

from __future__ import annotations

from extraction_dagster.addresses import shown_address
from extraction_dagster.errors.base import ExtractionError


class SchemeError(ExtractionError):
    """A row's address has a scheme that is not read."""

    permanent = True

    def __init__(self, uri: str, scheme: str) -> None:
        super().__init__(
            f"Address {shown_address(uri)!r} has scheme {scheme!r}, expected a path, file://, https://, s3:// or "
            f"gs://. Correct the row, or the setting EXTRACTION_SOURCE_URI_COLUMN or EXTRACTION_SOURCE_URI_TEMPLATE."
        )


class FileForbiddenError(ExtractionError):
    """A row's address points where nothing may be read, or at what is no regular file."""

    permanent = True

    def __init__(self, uri: str, why: str, *, roots: str) -> None:
        super().__init__(
            f"Address {shown_address(uri)!r} is refused: {why}. Expected a regular file under one of {roots}. "
            f"Correct the row, or add the folder to EXTRACTION_ALLOWED_ROOTS."
        )


class FileUnavailableError(ExtractionError):
    """A row's file is missing, empty or unreadable now; it may still arrive."""

    def __init__(self, uri: str, why: str) -> None:
        super().__init__(
            f"File {shown_address(uri)!r} is not available: {why}, expected a readable file with content. The record "
            f"is tried again later; the range goes on."
        )


class AddressForbiddenError(ExtractionError):
    """A row's address leads to a server, bucket or network that may not be read."""

    permanent = True

    def __init__(self, uri: str, why: str, fix: str) -> None:
        super().__init__(f"Address {shown_address(uri)!r} is refused: {why}. Nothing was read from it. {fix}")


class FileRefusedError(ExtractionError):
    """A server or bucket said for good that it has no such file, or not for us."""

    permanent = True

    def __init__(self, uri: str, answer: str) -> None:
        super().__init__(
            f"File {shown_address(uri)!r} can't be had: the answer was {answer}. Nothing was written for it; the range "
            f"goes on. Correct the row or the rights, then retry the record."
        )


class FileTooLargeError(ExtractionError):
    """A file is larger than may be downloaded."""

    permanent = True

    def __init__(self, uri: str, *, got_bytes: int, max_bytes: int) -> None:
        super().__init__(
            f"File {shown_address(uri)!r} has {got_bytes} bytes or more, expected at most {max_bytes}. It was not "
            f"kept; the range goes on. Raise EXTRACTION_MAX_FILE_BYTES (and EXTRACTION_CACHE_BYTES) if it is meant."
        )


class FileEncodedError(ExtractionError):
    """A server packed a file although it was asked not to; unpacking could fill any disk."""

    permanent = True

    def __init__(self, uri: str, encoding: str) -> None:
        super().__init__(
            f"File {shown_address(uri)!r} comes with Content-Encoding {encoding!r}, expected the file as it is: packed "
            f"answers are never unpacked. Nothing was written for it; the range goes on. Correct the server."
        )


class DownloadTimeoutError(ExtractionError):
    """A download took longer than allowed."""

    def __init__(self, uri: str, *, seconds: float) -> None:
        super().__init__(
            f"File {shown_address(uri)!r} did not arrive within {seconds:g} s. What arrived is kept, and the next try "
            f"goes on from there where the server allows it; the range goes on. Raise EXTRACTION_FETCH_TIMEOUT_SECONDS "
            f"if the files are large or the network slow."
        )


class FetchSetupError(ExtractionError):
    """Files can't be fetched as things are set up here: no record is to blame, so the run ends."""


class FetchExtraMissingError(FetchSetupError):
    """A bucket is to be read whose package is not installed."""

    def __init__(self, scheme: str, package: str) -> None:
        super().__init__(
            f"EXTRACTION_ALLOWED_BUCKETS names a {scheme}:// bucket, and the package {package} is not installed. "
            f"Nothing was read. Install the extra: pip install 'extraction-dagster[{scheme}]'."
        )


class FetchCredentialsError(FetchSetupError):
    """The credentials for a bucket are missing, expired or wrong."""

    def __init__(self, uri: str, said: str) -> None:
        super().__init__(
            f"The credentials for {shown_address(uri)!r} are not accepted: {said}. No record is to blame, and none was "
            f"marked. Set them as the store's own tools do (AWS_… variables or ~/.aws, "
            f"GOOGLE_APPLICATION_CREDENTIALS), then run the range again."
        )


class DownloadCacheError(FetchSetupError):
    """The cache of downloads can't be used."""

    def __init__(self, folder: str, why: str) -> None:
        super().__init__(
            f"The cache of downloads in {folder!r} can't be used: {why}. No record is to blame, and none was marked. "
            f"Make room there, or change EXTRACTION_CACHE_BYTES or EXTRACTION_HOME; then run the range again."
        )
