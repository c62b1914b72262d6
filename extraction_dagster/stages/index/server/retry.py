"""Which of a server's failures are temporary, and how long to wait before the next try."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

import tenacity

from extraction_dagster.errors.index import StoreRefusedError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qdrant_client import models

_Result = TypeVar("_Result")
_PASSING_CODES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL", "ABORTED")
_PASSING_STATUS = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)


class NotCompletedError(Exception):
    """The server took a write but did not say that it was applied."""

    def __init__(self, status: str) -> None:
        super().__init__(f"the server answered {status!r}, expected 'completed'")


def require_completed(result: models.UpdateResult) -> None:
    """Refuse a write that was only acknowledged: it may not be visible, or may still fail."""
    if result.status.value != "completed":
        raise NotCompletedError(result.status.value)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a call is repeated that may succeed later: exponential back-off with full jitter.

    Attributes:
        attempts: Tries in all.
        base_seconds: The longest wait before the second try; doubles at each further one.
        longest_seconds: The longest wait of all.
        longest_retry_after_seconds: The longest wait that a server may ask for.
        sleep: Waits that many seconds.
    """

    attempts: int = 8
    base_seconds: float = 0.5
    longest_seconds: float = 30.0
    longest_retry_after_seconds: float = 60.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def call(self, operation: str, url: str, function: Callable[[], _Result]) -> _Result:
        """Call, and call again while the failure is temporary.

        Raises:
            StoreUnavailableError: Every try failed.
            StoreRefusedError: The failure is not temporary.
        """
        from qdrant_client.http.exceptions import ApiException

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=self._wait,
            retry=tenacity.retry_if_exception(may_pass),
            sleep=self.sleep,
            reraise=True,
        )
        try:
            return retrying(function)
        except Exception as error:
            if may_pass(error):
                raise StoreUnavailableError(operation, url, self.attempts, reason(error)) from None
            if isinstance(error, ApiException) or _grpc_code(error) is not None:
                raise StoreRefusedError(operation, url, reason(error)) from None
            raise

    def _wait(self, state: tenacity.RetryCallState) -> float:
        asked = _retry_after(state.outcome.exception() if state.outcome else None)
        if asked is not None:
            return min(asked, self.longest_retry_after_seconds)
        return tenacity.wait_random_exponential(multiplier=self.base_seconds, max=self.longest_seconds)(state)


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    if isinstance(error, UnexpectedResponse):
        status = error.status_code or 0
        return status in _PASSING_STATUS or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    if isinstance(error, (NotCompletedError, ResourceExhaustedResponse, ResponseHandlingException)):
        return True
    return _grpc_code(error) in _PASSING_CODES


def reason(error: BaseException) -> str:
    """What went wrong in one line; never headers, which carry the API key."""
    code = _grpc_code(error)
    if code is not None:
        details = error.details() if hasattr(error, "details") else ""
        return f"{code}: {' '.join(str(details).split())}"
    from qdrant_client.http.exceptions import UnexpectedResponse

    if isinstance(error, UnexpectedResponse):
        return f"HTTP {error.status_code} {error.reason_phrase}: {error.content[:200].decode(errors='replace')}"
    return " ".join(str(error).split()) or type(error).__name__


def is_already_there(error: BaseException) -> bool:
    """Whether a creation failed because the collection exists by now."""
    return _grpc_code(error) == "ALREADY_EXISTS" or "already exists" in str(error).lower()


def _grpc_code(error: BaseException) -> str | None:
    """The status of a gRPC error, which its `code` method returns."""
    code = getattr(error, "code", None)
    return getattr(code(), "name", None) if callable(code) else None


def _retry_after(error: BaseException | None) -> float | None:
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import UnexpectedResponse

    if isinstance(error, ResourceExhaustedResponse):
        return float(error.retry_after_s)
    if isinstance(error, UnexpectedResponse):
        asked = str(error.headers.get("retry-after", "")) if error.headers is not None else ""
        return float(asked) if asked.isascii() and asked.isdigit() else None
    return None
