"""Errors of metrics and notices."""

from __future__ import annotations

from extraction_dagster.errors.base import ExtractionError


class MetricsAddressError(ExtractionError):
    """The metrics can't be served at an address."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(
            f"Metrics can't be served at {address}: {why}. Choose another one, for example --serve 127.0.0.1:9464."
        )


class MetricsFileError(ExtractionError):
    """The metrics can't be written to a file."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            f"Metrics can't be written to {path!r}: {why}. The file before, if any, is as it was. Choose a file in a "
            f"folder that is there and may be written."
        )


class NoticeError(ExtractionError):
    """A notice was not delivered; the address, which may be a secret, is not named."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(
            f"A notice was not delivered: {why}. Nothing else is affected. Correct EXTRACTION_NOTIFY and "
            f"EXTRACTION_NOTIFY_URL, then try it with 'extraction notify'."
        )


class NotifierError(ExtractionError):
    """EXTRACTION_NOTIFY names a function that can't be used."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            f"Setting EXTRACTION_NOTIFY is {path!r}: {why}. Nobody is told of failed runs. Expected none, log, "
            f"webhook, slack, or module:function of a function that takes one RunFailure."
        )
