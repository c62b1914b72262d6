"""Which of a server's failures are temporary, how long they are waited for, and what helps with the others."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

import tenacity

from extraction_dagster.errors.index import StoreLimitError, StoreRefusedError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qdrant_client import models

_Result = TypeVar("_Result")
_PASSING_CODES = {  # the last two are what a server or a proxy that is being stopped may end a call with
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL", "ABORTED", "CANCELLED", "UNKNOWN")
}
_PASSING_STATUS = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
# What the server says (1.18.3) when a request is beyond a limit of its own; smaller ones may be taken where `_SPLITS`.
_LIMIT = re.compile(r"Limit exceeded \d|larger than rate limiter|strict mode|disabled!|Index required", re.IGNORECASE)
_SPLITS = re.compile(r"larger than rate limiter|upsert limit|filter limit|condition", re.IGNORECASE)
# What a server says of a request that it understood and does not take.
_ABOUT_CONTENT = ("INVALID_ARGUMENT", "OUT_OF_RANGE", "HTTP 400", "HTTP 413", "HTTP 422")
# Failures whose codes may pass, though these do not: what is said, and what helps.
_LASTING = (
    (_LIMIT, "It is a limit of the collection on the server: docs/collection.md says what each of them does."),
    (
        re.compile(r"No space left|exceeds available disk space", re.IGNORECASE),
        "The server's disk is full: make room there. What it holds is not damaged.",
    ),
    (
        re.compile(r"recovery mode|killed during initialization", re.IGNORECASE),
        "The server is in recovery mode and reads nothing: see its log, give it more memory and start it again.",
    ),
    (
        re.compile(r"Expected SETTINGS frame|http1\.x server", re.IGNORECASE),
        "That port speaks HTTP, not gRPC: set EXTRACTION_QDRANT_GRPC_PORT to the server's gRPC port, usually 6334.",
    ),
    (
        re.compile(r"WRONG_VERSION_NUMBER"),
        "That port speaks no TLS: EXTRACTION_QDRANT_URL begins with http:// then; or it is not the gRPC port.",
    ),
)
_log = logging.getLogger(__name__)  # managed by Dagster: these lines are in the run's events too


class NotCompletedError(Exception):
    """The server took a write but did not say that it was applied."""

    def __init__(self, status: str) -> None:
        super().__init__(f"the server answered {status!r}, expected 'completed'")


def require_completed(write: Callable[[], models.UpdateResult]) -> None:
    """Write, and refuse an answer other than completed: the write may not be visible, or may still fail.

    A later server may have statuses that the client has no name for, and raises ValueError on.
    """
    try:
        status = str(write().status.value)
    except ValueError as error:
        if "UpdateStatus" not in str(error):
            raise
        status = str(error)
    if status != "completed":
        raise NotCompletedError(status)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a call is repeated that may succeed later: exponential back-off with full jitter, for a length of time.

    Attributes:
        budget_seconds: How long a call is repeated, from its first try on.
        attempts: Tries in all; as many as the time allows when None.
        base_seconds: The longest wait before the second try; doubles at each further one.
        longest_seconds: The longest wait of all.
        reconnect_seconds: The longest wait while the server can't be reached, so that one that is back is used at once.
        longest_retry_after_seconds: The longest wait that a server may ask for.
        silent_seconds: A failure that lasts is told this often.
        sleep: Waits that many seconds.
    """

    budget_seconds: float = 300.0
    attempts: int | None = None
    base_seconds: float = 0.5
    longest_seconds: float = 30.0
    reconnect_seconds: float = 2.0
    longest_retry_after_seconds: float = 60.0
    silent_seconds: float = 15.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def call(self, operation: str, where: str, function: Callable[[], _Result]) -> _Result:
        """Call, and call again while the failure is temporary.

        Raises:
            StoreUnavailableError: It did not pass in time.
            StoreLimitError: The request is beyond a limit of the server's own.
            StoreRefusedError: The failure is not temporary.
        """
        signs = _SignsOfLife(self, operation, where)
        stops: list[tenacity.stop.stop_base] = [tenacity.stop_before_delay(self.budget_seconds)]
        if self.attempts is not None:
            stops.append(tenacity.stop_after_attempt(self.attempts))
        retrying = tenacity.Retrying(
            stop=tenacity.stop_any(*stops),
            wait=self._wait,
            retry=tenacity.retry_if_exception(may_pass),
            before_sleep=signs.tell,
            sleep=self.sleep,
            reraise=True,
        )
        try:
            result = retrying(function)
        except Exception as error:
            raised = self._raised(error, operation, where, retrying.statistics)
            if raised is error:
                raise
            raise raised from None
        signs.tell_end()
        return result

    @staticmethod
    def _raised(error: Exception, operation: str, where: str, tried: dict[str, float]) -> Exception:
        """What the caller gets."""
        from qdrant_client.http.exceptions import ApiException

        if may_pass(error):
            seconds = time.monotonic() - tried["start_time"]
            return StoreUnavailableError(operation, where, int(tried["attempt_number"]), reason(error), seconds=seconds)
        if not (isinstance(error, ApiException) or _grpc_code(error) is not None or _fix(error)):
            return error
        if _LIMIT.search(str(reason(error))):
            return StoreLimitError(operation, where, reason(error), may_split=bool(_SPLITS.search(reason(error))))
        said, is_content = reason(error), reason(error).startswith(_ABOUT_CONTENT)
        return StoreRefusedError(operation, where, said, _fix(error), may_be_content=is_content)

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = _retry_after(error)
        if asked is not None:
            return min(asked, self.longest_retry_after_seconds)
        longest = self.longest_seconds
        if error is not None and _grpc_code(error) == "UNAVAILABLE":
            longest = min(longest, self.reconnect_seconds)
        return tenacity.wait_random_exponential(multiplier=self.base_seconds, max=longest)(state)


@dataclass(slots=True)
class _SignsOfLife:
    """Lines in the log while a call is repeated: the first after a second, so that a hiccup leaves none."""

    policy: RetryPolicy
    operation: str
    where: str
    begun: float = field(default_factory=time.monotonic)
    next_seconds: float = 1.0
    told: bool = False

    def tell(self, state: tenacity.RetryCallState) -> None:
        seconds = time.monotonic() - self.begun
        error = state.outcome.exception() if state.outcome else None
        if error is None or seconds < self.next_seconds:
            return
        left = self.policy.budget_seconds - seconds
        said = "%s can't %s for %.0f s now (%s); asked again for %.0f s more"
        _log.warning(said, self.where, self.operation, seconds, reason(error), left)
        self.told, self.next_seconds = True, seconds + self.policy.silent_seconds

    def tell_end(self) -> None:
        if self.told:
            _log.info("%s answers again, after %.0f s", self.where, time.monotonic() - self.begun)


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    if _fix(error):
        return False
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


def _fix(error: BaseException) -> str:
    """What helps with a failure that lasts though its code may pass; empty for every other."""
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import UnexpectedResponse

    if _grpc_code(error) is None and not isinstance(error, (ResourceExhaustedResponse, UnexpectedResponse)):
        return ""
    said = reason(error)
    return next((fix for pattern, fix in _LASTING if pattern.search(said)), "")


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
