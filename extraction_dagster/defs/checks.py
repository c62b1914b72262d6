"""Checks: what is looked at in each run of a range, and shown beside its assets."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

from extraction_dagster.defs.metadata import stopped_table
from extraction_dagster.defs.partitions import id_ranges

if TYPE_CHECKING:
    from extraction_dagster.ranges.work import RangeWork
    from extraction_dagster.stages.catalog.ledger import LedgerEntry


def _spec(name: str, asset: str, description: str, *, blocking: bool = False) -> dg.AssetCheckSpec:
    with warnings.catch_warnings():
        # Without partitions, the next range's result would hide this one's. Dagster calls that a preview.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return dg.AssetCheckSpec(
            name, asset=asset, description=description, blocking=blocking, partitions_def=id_ranges
        )


_FEWEST_RECORDS = 10  # of a range of three records, one is a third
_FAILURE_RATE = (
    "No more than EXTRACTION_MAX_FAILURE_RATE of the range's records are failed or parked, where it has ten or "
    "more. It only warns."
)
NO_EMPTY_VIDEO = _spec(
    "no_zero_frame_video",
    "video_frames",
    "Every record that is marked as extracted has at least one stored frame.",
    blocking=True,
)
FRAMES_FAILURE_RATE = _spec("failure_rate", "video_frames", _FAILURE_RATE)
VECTORS_NORMALISED = _spec(
    "vectors_normalised",
    "frame_embeddings",
    "Every vector written has length 1, up to the rounding of float16; read back before rows are marked.",
    blocking=True,
)
POINTS_VERIFIED = _spec(
    "points_verified",
    "qdrant_points",
    "Qdrant holds exactly the expected points of every record of the range that is done. Each record is verified "
    "before it is marked, and the whole range once more at the end; what disagrees is pending again.",
    blocking=True,
)
POINTS_FAILURE_RATE = _spec("failure_rate", "qdrant_points", _FAILURE_RATE)


def no_zero_frame_video(entries: Mapping[int, "LedgerEntry"]) -> dg.AssetCheckResult:
    """Look for records that are marked without a frame."""
    extracted = [entry for entry in entries.values() if entry.state in {"extracted", "embedded", "done"}]
    empty = sorted(entry.record_id for entry in extracted if not entry.num_frames)
    found = f"{len(empty)} of {len(extracted)} extracted records have no frame"
    return dg.AssetCheckResult(
        check_name=NO_EMPTY_VIDEO.name,
        passed=not empty,
        description=f"{found}: {', '.join(map(str, empty[:10]))}." if empty else f"{found}.",
        metadata={"records": len(extracted), "records_without_frames": len(empty)},
    )


def failure_rate(work: "RangeWork", spec: dg.AssetCheckSpec) -> dg.AssetCheckResult:
    """Compare the share of records that are failed or parked now with the setting."""
    num_records, most = len(work.plan), work.settings.max_failure_rate
    bad = [entry for _, entry in sorted(work.entries().items()) if entry.state in {"failed", "parked"}]
    rate = len(bad) / num_records if num_records else 0.0
    metadata: dict[str, Any] = {"records": num_records, "records_failed_or_parked": len(bad), "rate": round(rate, 4)}
    return dg.AssetCheckResult(
        check_name=spec.name,
        passed=rate <= most or num_records < _FEWEST_RECORDS,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{len(bad)} of {num_records} records are failed or parked ({rate:.1%}; {most:.1%} is allowed "
        f"where there are {_FEWEST_RECORDS} or more).",
        metadata=metadata | stopped_table("records_table", bad),
    )


def vectors_normalised(*, num_vectors: int, unnormalised: int) -> dg.AssetCheckResult:
    """Say how many vectors of this run are not of length 1."""
    return dg.AssetCheckResult(
        check_name=VECTORS_NORMALISED.name,
        passed=unnormalised == 0,
        description=f"{unnormalised} of {num_vectors} vectors written do not have length 1.",
        metadata={"vectors": num_vectors, "vectors_unnormalised": unnormalised},
    )


def points_verified(*, points: int) -> dg.AssetCheckResult:
    """Say how many points the range has, all of them verified."""
    return dg.AssetCheckResult(
        check_name=POINTS_VERIFIED.name,
        passed=True,
        description=f"Qdrant holds exactly the {points} points of the range's finished records.",
        metadata={"points": points},
    )


def points_differ(error: Exception) -> dg.AssetCheckResult:
    """Say which points differ, in the error's own words; the run fails with it."""
    return dg.AssetCheckResult(check_name=POINTS_VERIFIED.name, passed=False, description=str(error))
