"""The assets, in data order: source_table (others write it), video_frames, frame_embeddings, qdrant_points.

The last three have one partition per range of ids. What each does with a range is in `extraction_dagster/ranges/`;
here is what Dagster shows of it: checks, metadata, versions.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

from extraction_dagster.defs import checks
from extraction_dagster.defs.metadata import (
    CODE_VERSION_TAG,
    as_metadata,
    code_versions,
    data_version,
    failures_table,
    stopped_table,
)
from extraction_dagster.defs.partitions import id_ranges
from extraction_dagster.defs.resources import Extraction, open_step
from extraction_dagster.errors.index import PointsChangedError, PointsMissingError
from extraction_dagster.run_options import describe_options
from extraction_dagster.settings import load_settings

if TYPE_CHECKING:
    from extraction_dagster.ranges.work import RangeWork, Report

_settings = load_settings()
_versions = code_versions(_settings)
_COMMON: dict[str, Any] = {
    "partitions_def": id_ranges,
    "group_name": "extraction",
    "owners": list(_settings.owners),
}

source_table = dg.AssetSpec(
    "source_table",
    group_name="extraction",
    kinds={"table", _settings.source_kind},
    owners=list(_settings.owners),
    tags={"extraction/stage": "catalog"},
    metadata={"dagster/table_name": ".".join(filter(None, (_settings.source_schema, _settings.source_table)))},
    description="The table of videos, one row each. Others write it; extraction_sensor turns its rows into ranges of "
    "ids, and the marks `is_extracted` and `is_embedded` say what is done.",
)


@dg.asset(
    **_COMMON,
    deps=[source_table],
    pool="decode",
    kinds={"ffmpeg", "parquet"},
    tags={"extraction/stage": "decode"},
    code_version=_versions["video_frames"],
    check_specs=[checks.NO_EMPTY_VIDEO, checks.FRAMES_FAILURE_RATE],
    description="Frames sampled from each video of the range, as JPEG in Parquet shards; marks `is_extracted`.",
)
def video_frames(context: dg.AssetExecutionContext, extraction: Extraction) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Fetch, decode and sample the range's pending rows; finished shards of an earlier try are kept."""
    from extraction_dagster.ranges.decode import decode_range

    with open_step(context, extraction, begins=True) as work:
        report = decode_range(work)
        found = [
            checks.no_zero_frame_video(work.entries()),
            checks.failure_rate(work, checks.FRAMES_FAILURE_RATE),
        ]
        return _result("video_frames", work, report, found, extraction.options)


@dg.asset(
    **_COMMON,
    deps=[video_frames],
    pool="gpu",
    kinds={"pytorch", "parquet"},
    tags={"extraction/stage": "embed"},
    code_version=_versions["frame_embeddings"],
    check_specs=[checks.VECTORS_NORMALISED],
    description="One L2-normalised vector per frame, float16 in Parquet, one shard per frame shard.",
)
def frame_embeddings(context: dg.AssetExecutionContext, extraction: Extraction) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Embed the frame shards that hold a pending row and have no vectors yet."""
    from extraction_dagster.ranges.embed import embed_range

    with open_step(context, extraction) as work:
        report = embed_range(work)
        num_vectors = int(report.numbers["frames"])
        found = [checks.vectors_normalised(num_vectors=num_vectors, unnormalised=report.unnormalised)]
        return _result("frame_embeddings", work, report, found, extraction.options)


@dg.asset(
    **_COMMON,
    deps=[frame_embeddings],
    pool="qdrant",
    kinds={"qdrant"},
    tags={"extraction/stage": "index"},
    code_version=_versions["qdrant_points"],
    check_specs=[checks.POINTS_VERIFIED, checks.POINTS_FAILURE_RATE],
    description="The range's points in Qdrant, verified by exact count; then the rows are marked `is_embedded`.",
)
def qdrant_points(
    context: dg.AssetExecutionContext, extraction: Extraction
) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult]:  # type: ignore[type-arg]
    """Replace the points of every pending row whose vectors are stored; mark a row once its points are verified."""
    from extraction_dagster.ranges.index import index_range

    with open_step(context, extraction) as work:
        try:
            report = index_range(work)
        except (PointsMissingError, PointsChangedError) as error:
            yield checks.points_differ(error)
            raise
        found = [
            checks.points_verified(points=report.verified),
            checks.failure_rate(work, checks.POINTS_FAILURE_RATE),
        ]
        yield _result("qdrant_points", work, report, found, extraction.options)


def _result(
    asset: str, work: "RangeWork", report: "Report", found: list[dg.AssetCheckResult], options: Mapping[str, object]
) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """A materialization: numbers that plot over time, failures, a contact sheet; and what it was made with."""
    entries = work.entries()
    mine = [entry for record_id, entry in sorted(entries.items()) if record_id in work.plan]
    states = [entry.state for entry in mine]
    failed_now = {failure.record_id for failure in report.failures}
    stopped = [entry for entry in mine if entry.state in {"failed", "parked"} and entry.record_id not in failed_now]
    numbers = {
        "records": len(work.plan),
        **report.numbers,
        "failures": len(report.failures),
        "records_failed": states.count("failed"),
        "records_parked": states.count("parked"),
        # Of the whole range, whatever this run did of it: a retry of one row hides nothing of the others.
        "videos_in_range": sum(state in {"extracted", "embedded", "done"} for state in states),
        "frames_in_range": sum(entry.num_frames or 0 for entry in mine if entry.state != "failed"),
    }
    texts = {
        "options": describe_options(options),
        "frames_fingerprint": work.fingerprints.frames,
        "embedding_fingerprint": work.fingerprints.embedding,
    }
    pictures = {"contact_sheet": dg.MetadataValue.md(report.contact_sheet)} if report.contact_sheet else {}
    return dg.MaterializeResult(
        metadata={
            **pictures,
            **failures_table(report.failures),
            **stopped_table("earlier_failures", stopped),
            **as_metadata(numbers, texts),
        },
        check_results=found,
        data_version=data_version(asset, entries),
        tags={CODE_VERSION_TAG: code_versions(work.settings)[asset]},
    )
