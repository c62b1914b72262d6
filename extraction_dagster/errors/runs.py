"""Errors of runs and backfills, of the cursor and its mirrors, of metrics and notices."""

from extraction_dagster.errors import ExtractionError, PermanentError, some


class InstanceError(ExtractionError):
    """The Dagster instance can't be opened."""

    def __init__(self, home: str, reason: str) -> None:
        super().__init__(f"""DAGSTER_HOME is {home!r}, and no Dagster instance opens there: {reason}. Set DAGSTER_HOME
            to the folder that holds dagster.yaml, or unset it to use the one under EXTRACTION_HOME.""")


class HomeError(ExtractionError):
    """The data folder can't be made."""

    def __init__(self, home: str, why: str) -> None:
        super().__init__(f"""EXTRACTION_HOME is {home!r}, and that folder can't be made or written: {why}. Nothing was
            done. Permit it, or set EXTRACTION_HOME to another folder.""")


class StorageError(ExtractionError):
    """Dagster's own storage can't be reached."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"""Dagster's storage of runs, events and cursors can't be used: {where}: {reason}. What was
            finished is kept. Bring the database back, or correct the setting, then run the same command again.""")


class RangeBusyError(ExtractionError):
    """A range was launched that has an active run."""

    def __init__(self, key: str, run_id: str, *, silent_seconds: float | None = None) -> None:
        silent = (
            f""" It works on another machine or in another container, and gave no sign of life for
            {silent_seconds:.0f} s; after EXTRACTION_DEAD_AFTER_SECONDS it is taken for dead."""
            if silent_seconds
            else ""
        )
        super().__init__(f"""Range {key} has an active run, {run_id}: nothing was launched.{silent} Wait until it ends,
            or terminate it in the UI.""")


class SensorBusyError(ExtractionError):
    """A command would tick while a daemon ticks."""

    def __init__(self) -> None:
        super().__init__("""A Dagster daemon is running the sensor, and processes new rows itself: nothing is started
            beside it. Watch it with 'extraction status' or in the UI, or stop the sensor there first. A daemon that was
            stopped counts as running for three minutes more.""")


class RunFailedError(ExtractionError):
    """A run that a command launched has failed."""

    def __init__(self, key: str, run_id: str, reason: str) -> None:
        super().__init__(f"""Range {key} failed (run {run_id}): {reason} What was finished is kept; 'extraction launch
            {key}' goes on from there.""")


class RunOptionError(PermanentError):
    """An option in a run's config is wrong, or would change nothing."""

    def __init__(self, name: str, got: str, expected: str) -> None:
        super().__init__(f"""Run option {name} is {got}, expected {expected}. Nothing was started. Correct it in the
            run's config, under resources: extraction: config; what is left out is as the settings say.""")


class OtherModelError(PermanentError):
    """A run was given another model than the settings, and no collection was staged for its vectors."""

    def __init__(self, options: str, *, fingerprint: str, collection: str, there: str, environment: str) -> None:
        super().__init__(f"""The run's config ({options}) gives vectors of fingerprint {fingerprint}, and no collection
            {collection!r} takes them (there: {there}). Nothing was started: vectors of two models never mix. Run
            '{environment} extraction collection stage' first, or leave the model out.""")


class SettingsChangedError(PermanentError):
    """Between two steps of one run, other settings (or another file of the model) gave other fingerprints."""

    def __init__(self, key: str, *, began: str, now: str) -> None:
        super().__init__(f"""Range {key}: settings that decide frames or vectors have changed since its run began: it
            began with {began}, and now they give {now}. Nothing was stored under the new ones, and what was finished is
            kept. Launch the range again ('extraction launch {key}'), or leave that to the sensor.""")


class FramesMissingError(PermanentError):
    """Records are to be embedded again, and their frames are not stored."""

    def __init__(self, key: str, record_ids: list[int]) -> None:
        super().__init__(f"""Range {key}: {len(record_ids)} records have no stored frames of these settings
            ({some(record_ids)}). The others were embedded; what these had stays. Launch extraction_job on the range: it
            decodes.""")


class VectorsMissingError(PermanentError):
    """Records are to be indexed again, and their vectors are not stored."""

    def __init__(self, key: str, record_ids: list[int]) -> None:
        super().__init__(f"""Range {key}: {len(record_ids)} records have no stored vectors of these settings
            ({some(record_ids)}). The others were indexed; what these had stays. Launch embedding_job on the range: it
            embeds.""")


_MOST_RANGES = 5  # named in one sentence


class BackfillUnknownError(ExtractionError):
    """No backfill has the id that was named."""

    def __init__(self, backfill_id: str, why: str) -> None:
        super().__init__(f"""No backfill {backfill_id!r} can be shown or cancelled: {why}. Nothing was changed. Runs >
            Backfills in the UI lists them.""")


class DaemonMissingError(ExtractionError):
    """A command would wait for runs that no daemon starts."""

    def __init__(self) -> None:
        super().__init__("""No Dagster daemon is running, which would start the runs: nothing was launched. Start it in
            the folder of workspace.yaml with 'dagster dev -w workspace.yaml' (or 'dagster-daemon run -w
            workspace.yaml'), leave out --wait, or process the ranges in this process with --here.""")


class BackfillFailedError(ExtractionError):
    """A backfill has ended, and not all of its ranges are done."""

    def __init__(self, what: str, ranges: list[str], *, total: int, finished: int, reason: str = "") -> None:
        more = f" and {len(ranges) - _MOST_RANGES} more" if len(ranges) > _MOST_RANGES else ""
        failed = f", {len(ranges)} failed ({', '.join(ranges[:_MOST_RANGES])}{more})" if ranges else ""
        why = f"{reason.rstrip('. ')}. " if reason else ""
        super().__init__(f"""{what}: {finished} of {total} ranges are done{failed}. {why}What was finished is kept: the
            same command goes on from there, with --stale-only on what is missing alone.""")


class CursorError(ExtractionError):
    """What the cursor store keeps can't be used."""

    def __init__(self, why: str) -> None:
        super().__init__(f"""The stored cursor can't be used: {why}. Nothing was changed, and the rows still know what
            is done. Look at it with 'extraction checkpoint show'; 'extraction checkpoint reset --storage cursor'
            derives it from the rows once more, and 'extraction init --take-over' takes up a database that moved.""")


class MirrorError(ExtractionError):
    """A mirror of the checkpoint can't be reached."""

    def __init__(self, name: str, action: str, reason: str) -> None:
        super().__init__(f"""Checkpoint mirror {name} can't be {action}: {reason}. The cursor store is not affected.
            Restore access to it, or set EXTRACTION_CHECKPOINT_MIRROR=none.""")


class LostCursorError(ExtractionError):
    """The cursor store is empty and the mirror, which would speak for it, is corrupt."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"""The cursor store is empty, and checkpoint mirror {name} is corrupt: {why}. Nothing was
            started. Mend or remove it, or say where to start with 'extraction checkpoint set ID' or 'extraction
            checkpoint reset'.""")


class LegacyCheckpointError(ExtractionError):
    """The earlier script's checkpoint can't be imported."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"""No checkpoint was imported from {where}: {why}. Nothing was changed. Name the right file,
            or say where to start with 'extraction checkpoint set ID'.""")


class MetricsAddressError(ExtractionError):
    """The metrics can't be served at an address."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(f"""Metrics can't be served at {address}: {why}. Choose another one, for example --serve
            127.0.0.1:9464.""")


class MetricsFileError(ExtractionError):
    """The metrics can't be written to a file."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"""Metrics can't be written to {path!r}: {why}. The file before, if any, is as it was. Choose
            a file in a folder that is there and may be written.""")


class NoticeError(ExtractionError):
    """A notice was not delivered; the address, which may be a secret, is not named."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"""A notice was not delivered: {why}. Nothing else is affected. Correct EXTRACTION_NOTIFY and
            EXTRACTION_NOTIFY_URL, then try it with 'extraction notify'.""")


class NotifierError(ExtractionError):
    """EXTRACTION_NOTIFY names a function that can't be used."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"""Setting EXTRACTION_NOTIFY is {path!r}: {why}. Nobody is told of failed runs. Expected none,
            log, webhook, slack, or module:function of a function that takes one RunFailure.""")
