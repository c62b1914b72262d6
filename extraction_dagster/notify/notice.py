"""What a notice says, for people and for programs; never a password or a signature."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster.addresses import scrubbed

if TYPE_CHECKING:
    from extraction_dagster.settings import Settings

_LONGEST_ERROR = 600
_SHORTEST_SECRET = 4
_HIDDEN = "(hidden)"


@dataclass(frozen=True, slots=True)
class RunFailure:
    """A run that failed.

    Attributes:
        run_id: In Dagster's run history.
        job: The job's name.
        key: The range's partition key; None for a run without one.
        step: The step that failed first; empty when the run failed outside of its steps.
        error: That step's own sentence.
        failed_records: Records that failed in this run; None when that could not be looked up.
        failures_in_a_row: Failed runs of the range since its last success, this one included.
        is_test: Whether nothing has failed, and somebody tests whether notices arrive.
    """

    run_id: str
    job: str
    key: str | None
    step: str
    error: str
    failed_records: int | None = None
    failures_in_a_row: int = 1
    is_test: bool = False

    @property
    def fix(self) -> str:
        """What a person can do."""
        if self.key is None:
            return "Look at the run in the UI, then launch the job again."
        return (
            f"Nothing is lost: the sensor asks for the range again, and it goes on where it was. Once the cause is "
            f"mended, 'extraction launch {self.key}' does so at once; 'extraction errors' lists records that failed."
        )

    @property
    def text(self) -> str:
        """The notice for people."""
        test = "This is a test, nothing has failed. " if self.is_test else ""
        what = f"Range {self.key}" if self.key else f"Job {self.job}"
        where = f" at {self.step}" if self.step else ""
        again = f", for the {_ordinal(self.failures_in_a_row)} time in a row" if self.failures_in_a_row > 1 else ""
        return (
            f"{test}{what} failed{where} (run {self.run_id}){again}: {_sentence(self.error)}{self._records} {self.fix}"
        )

    @property
    def _records(self) -> str:
        if self.failed_records is None:
            return " How many of its records failed is not known."
        return f" {self.failed_records} of its records failed." if self.failed_records else ""

    def document(self) -> dict[str, Any]:
        """The notice for programs; the keys are stable."""
        return {"event": "run_failed", **asdict(self), "fix": self.fix, "text": self.text}


def redact(text: str, settings: Settings) -> str:
    """A text in one paragraph, not too long, without any secret of the settings, credentials or signatures."""
    for secret in _secrets(settings):
        text = text.replace(secret, _HIDDEN)
    text = " ".join(scrubbed(text).split())
    return text if len(text) <= _LONGEST_ERROR else f"{text[: _LONGEST_ERROR - 1]}…"


def _secrets(settings: Settings) -> list[str]:
    """Every secret that is set, and the passwords within addresses; the longest first."""
    found: set[str] = set()
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            found.add(value.get_secret_value())
            found.update(_password(value.get_secret_value()))
    return sorted((secret for secret in found if len(secret) >= _SHORTEST_SECRET), key=len, reverse=True)


def _password(address: str) -> list[str]:
    try:
        password = sa.make_url(address).password
    except (sa.exc.ArgumentError, ValueError):
        return []
    return [str(password)] if password else []


def _sentence(text: str) -> str:
    text = text.strip() or "no reason was given"
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in {11, 12, 13} else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
