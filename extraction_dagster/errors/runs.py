"""Errors of runs and backfills: their options, and what they lack."""

from __future__ import annotations

from extraction_dagster.errors.base import ExtractionError, some


class InstanceError(ExtractionError):
    """The Dagster instance can't be opened."""

    def __init__(self, home: str, reason: str) -> None:
        super().__init__(
            f"DAGSTER_HOME is {home!r}, and no Dagster instance opens there: {reason}. "
            f"Set DAGSTER_HOME to the folder that holds dagster.yaml, or unset it to use the one under EXTRACTION_HOME."
        )


class RangeBusyError(ExtractionError):
    """A range was launched that has an active run."""

    def __init__(self, key: str, run_id: str) -> None:
        super().__init__(
            f"Range {key} has an active run, {run_id}: nothing was launched. "
            f"Wait until it ends, or terminate it in the UI."
        )


class SensorBusyError(ExtractionError):
    """A command would tick while a daemon ticks."""

    def __init__(self) -> None:
        super().__init__(
            "A Dagster daemon is running the sensor, and processes new rows itself: nothing is started beside it. "
            "Watch it with 'extraction status' or in the UI, or stop the sensor there first. A daemon that was stopped "
            "counts as running for three minutes more."
        )


class RunFailedError(ExtractionError):
    """A run that a command launched has failed."""

    def __init__(self, key: str, run_id: str, reason: str) -> None:
        super().__init__(
            f"Range {key} failed (run {run_id}): {reason} "
            f"What was finished is kept; 'extraction launch {key}' goes on from there."
        )


class RunOptionError(ExtractionError):
    """An option in a run's config is wrong, or would change nothing."""

    permanent = True

    def __init__(self, name: str, got: str, expected: str) -> None:
        super().__init__(
            f"Run option {name} is {got}, expected {expected}. Nothing was started. Correct it in the run's config, "
            f"under resources: extraction: config; what is left out is as the settings say."
        )


class OtherModelError(ExtractionError):
    """A run was given another model than the settings, and no collection was staged for its vectors."""

    permanent = True

    def __init__(self, options: str, *, fingerprint: str, collection: str, there: str, environment: str) -> None:
        super().__init__(
            f"The run's config ({options}) gives vectors of fingerprint {fingerprint}, and no collection "
            f"{collection!r} takes them (there: {there}). Nothing was started: vectors of two models never mix. "
            f"Run '{environment} extraction collection stage' first, or leave the model out."
        )


class SettingsChangedError(ExtractionError):
    """Between two steps of one run, other settings (or another file of the model) gave other fingerprints."""

    permanent = True

    def __init__(self, key: str, *, began: str, now: str) -> None:
        super().__init__(
            f"Range {key}: settings that decide frames or vectors have changed since its run began: it began with "
            f"{began}, and now they give {now}. Nothing was stored under the new ones, and what was finished is kept. "
            f"Launch the range again ('extraction launch {key}'), or leave that to the sensor."
        )


class FramesMissingError(ExtractionError):
    """Records are to be embedded again, and their frames are not stored."""

    permanent = True

    def __init__(self, key: str, record_ids: list[int]) -> None:
        super().__init__(
            f"Range {key}: {len(record_ids)} records have no stored frames of these settings ({some(record_ids)}). "
            f"The others were embedded; what these had stays. Launch extraction_job on the range: it decodes."
        )


class VectorsMissingError(ExtractionError):
    """Records are to be indexed again, and their vectors are not stored."""

    permanent = True

    def __init__(self, key: str, record_ids: list[int]) -> None:
        super().__init__(
            f"Range {key}: {len(record_ids)} records have no stored vectors of these settings ({some(record_ids)}). "
            f"The others were indexed; what these had stays. Launch embedding_job on the range: it embeds."
        )


_MOST_RANGES = 5  # named in one sentence


class BackfillUnknownError(ExtractionError):
    """No backfill has the id that was named."""

    def __init__(self, backfill_id: str, why: str) -> None:
        super().__init__(
            f"No backfill {backfill_id!r} can be shown or cancelled: {why}. Nothing was changed. Runs > Backfills in "
            f"the UI lists them."
        )


class DaemonMissingError(ExtractionError):
    """A command would wait for runs that no daemon starts."""

    def __init__(self) -> None:
        super().__init__(
            "No Dagster daemon is running, which would start the runs: nothing was launched. Start it in the folder of "
            "workspace.yaml with 'dagster dev -w workspace.yaml' (or 'dagster-daemon run -w workspace.yaml'), leave "
            "out --wait, or process the ranges in this process with --here."
        )


class BackfillFailedError(ExtractionError):
    """A backfill has ended, and not all of its ranges are done."""

    def __init__(self, what: str, ranges: list[str], *, total: int, finished: int, reason: str = "") -> None:
        more = f" and {len(ranges) - _MOST_RANGES} more" if len(ranges) > _MOST_RANGES else ""
        failed = f", {len(ranges)} failed ({', '.join(ranges[:_MOST_RANGES])}{more})" if ranges else ""
        why = f"{reason.rstrip('. ')}. " if reason else ""
        super().__init__(
            f"{what}: {finished} of {total} ranges are done{failed}. {why}What was finished is kept: the same command "
            f"goes on from there, with --stale-only on what is missing alone."
        )
