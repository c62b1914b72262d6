"""The three assets, in data order: video_frames, frame_embeddings, qdrant_points; one partition per range of ids."""

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

import dagster as dg

from extraction_dagster import progress
from extraction_dagster.defs.partitions import above_floor, id_ranges, register
from extraction_dagster.defs.resources import Extraction, plain_failures
from extraction_dagster.errors import EmptyRangeError
from extraction_dagster.records import Failure, IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.decode.frame_store import frames_fingerprint
from extraction_dagster.stages.embed.model import embedding_settings_fingerprint

if TYPE_CHECKING:
    from extraction_dagster.stages.catalog.catalog import Catalog, PlannedRow

_log = logging.getLogger(__name__)  # managed by Dagster: what is said here is in the run's events too
_settings = load_settings()
_COMMON: dict[str, Any] = {"partitions_def": id_ranges, "group_name": "extraction", "owners": ["team:extraction"]}
_MOST_FAILURES_SHOWN = 100


@dg.asset(
    **_COMMON,
    pool="decode",
    kinds={"parquet", "ffmpeg"},
    code_version=frames_fingerprint(_settings),
    description="Frames sampled from each video of the range, as JPEG in Parquet shards; marks `is_extracted`.",
)
def video_frames(context: dg.AssetExecutionContext, extraction: Extraction) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Fetch, decode and sample the range's pending rows; finished shards of an earlier try are kept."""
    started = time.perf_counter()
    with plain_failures(), extraction.catalog() as catalog:
        id_range = register(context)
        plan = catalog.begin(above_floor(context, id_range), extraction.fingerprints)
        if not plan:
            raise EmptyRangeError(id_range.partition_key, catalog.source.name, catalog.source.extent())
        decoded = _decode(context, extraction, catalog, id_range, plan)
    return _result(plan, decoded, seconds=time.perf_counter() - started)


def _decode(
    context: dg.AssetExecutionContext,
    extraction: Extraction,
    catalog: "Catalog",
    id_range: IdRange,
    plan: Mapping[int, "PlannedRow"],
) -> dict[str, Any]:
    from extraction_dagster.stages.decode.stage import LandedShard, decode_rows  # noqa: PLC0415 - loads the decoders' neighbours

    store, made_with = extraction.frame_store(), extraction.fingerprints.frames
    todo = _todo(plan)
    kept = _stored(store.shards(id_range), todo)
    _mark_extracted(catalog, plan, {key: number for key, number in kept.items() if _unmarked(plan[key])}, made_with)
    rows = [planned.video for record_id, planned in todo.items() if record_id not in kept]
    if rows:
        _log.info("Processing batch of %d records (IDs: %d - %d)", len(rows), id_range.first_id, id_range.last_id)
    else:
        _log.info("Nothing to decode (IDs: %d - %d)", id_range.first_id, id_range.last_id)
    progress.begin("video_frames", len(rows))
    failures: list[Failure] = []
    num_frames = num_bytes = 0

    def keep(landed: LandedShard) -> None:
        nonlocal num_frames, num_bytes
        if landed.shard is not None:
            _mark_extracted(
                catalog, plan, {record.record_id: record.num_frames for record in landed.shard.records}, made_with
            )
        _write_failures(context, catalog, plan, landed.failures)
        failures.extend(landed.failures)
        num_frames, num_bytes = num_frames + landed.num_frames, num_bytes + landed.num_bytes
        progress.advance("video_frames", landed.num_videos + len(landed.failures))

    shards = decode_rows(rows, store=store, partition=id_range, settings=extraction.settings)
    with closing(shards):  # an interruption keeps, and marks, what was finished by then
        for landed in shards:
            keep(landed)
    return {
        "videos": len(rows) - len(failures),
        "videos_kept": len(kept),
        "frames": num_frames,
        "bytes": num_bytes,
        "failures": failures,
    }


@dg.asset(
    **_COMMON,
    deps=[video_frames],
    pool="gpu",
    kinds={"pytorch", "parquet"},
    code_version=embedding_settings_fingerprint(_settings),
    description="One L2-normalised vector per frame, float16 in Parquet, one shard per frame shard.",
)
def frame_embeddings(context: dg.AssetExecutionContext, extraction: Extraction) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Embed the frame shards that hold a pending row and have no vectors yet."""
    from extraction_dagster.stages.embed.model import load_model  # noqa: PLC0415 - loads torch
    from extraction_dagster.stages.embed.stage import embed_shards  # noqa: PLC0415

    started = time.perf_counter()
    failures: list[Failure] = []
    num_frames = 0
    with plain_failures(), extraction.catalog() as catalog:
        id_range = register(context)
        frames, store = extraction.frame_store(), extraction.embedding_store()
        plan = catalog.plan(above_floor(context, id_range), extraction.fingerprints)
        todo = _todo(plan)
        there = _stored(store.shards(id_range), todo)
        wanted = [shard for shard in frames.shards(id_range) if _stored([shard], todo).keys() - there]
        progress.begin("frame_embeddings", sum(len(shard.records) for shard in wanted))
        if wanted:
            model = load_model(extraction.settings)
            for done in embed_shards(
                wanted, frames=frames, store=store, model=model, partition=id_range, settings=extraction.settings
            ):
                failed = [item for item in done.failures if _concerns(item, todo)]
                _write_failures(context, catalog, plan, failed)
                failures += failed
                num_frames += done.num_frames
                progress.advance("frame_embeddings", len(done.shard.records) + len(done.failures))
        embedded = _stored(store.shards(id_range), todo)
        catalog.mark_embedded(embedded, extraction.fingerprints.embedding)
    counts = {"videos": len(embedded), "frames": num_frames, "shards": len(wanted), "failures": failures}
    return _result(plan, counts, seconds=time.perf_counter() - started)


@dg.asset(
    **_COMMON,
    deps=[frame_embeddings],
    pool="qdrant",
    kinds={"qdrant"},
    code_version=embedding_settings_fingerprint(_settings),
    description="The range's points in Qdrant, verified by exact count; then the rows are marked `is_embedded`.",
)
def qdrant_points(context: dg.AssetExecutionContext, extraction: Extraction) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Replace the points of every pending row whose vectors are stored; mark a row once its points are verified."""
    started = time.perf_counter()
    with plain_failures(), extraction.catalog() as catalog:
        id_range = register(context)
        plan = catalog.plan(above_floor(context, id_range), extraction.fingerprints)
        num_points, failures = _index(context, extraction, catalog, id_range, plan)
        _let_frames_go(extraction, catalog, id_range)
        if num_points:
            _compact(extraction, catalog, id_range)
    counts = {"videos": len(num_points), "points": sum(num_points.values()), "failures": failures}
    return _result(plan, counts, seconds=time.perf_counter() - started)


def _let_frames_go(extraction: Extraction, catalog: "Catalog", id_range: IdRange) -> None:
    """Remove frames that the settings keep no longer, now that their records are done."""
    from extraction_dagster.stages.decode.retention import keep_time, prune_frames  # noqa: PLC0415

    keep = keep_time(extraction.settings.keep_frames)
    if keep is not None:
        entries = catalog.ledger.entries(id_range)
        prune_frames(extraction.frame_store(), id_range, entries, extraction.fingerprints, keep=keep)


def _compact(extraction: Extraction, catalog: "Catalog", id_range: IdRange) -> None:
    """Merge small shards once there are many; what can't be merged now is left as it is."""
    from extraction_dagster.stages.decode.compaction import CompactionOptions, compact_frames  # noqa: PLC0415
    from extraction_dagster.stages.embed.compaction import compact_embeddings  # noqa: PLC0415

    options = CompactionOptions.from_settings(extraction.settings)
    try:
        compact_frames(extraction.frame_store(), id_range, catalog.ledger.entries(id_range), options)
        compact_embeddings(extraction.embedding_store(), id_range, options)
    except OSError as error:
        _log.warning("Small shards of range %s stay as they are: %s", id_range, error)


def _index(
    context: dg.AssetExecutionContext,
    extraction: Extraction,
    catalog: "Catalog",
    id_range: IdRange,
    plan: Mapping[int, "PlannedRow"],
) -> tuple[dict[int, int], list[Failure]]:
    """Index shard by shard, so that an interruption costs one shard at most."""
    from extraction_dagster.stages.index.point_store import CollectionSpec, open_point_store  # noqa: PLC0415 - loads the engine
    from extraction_dagster.stages.index.points import generation  # noqa: PLC0415
    from extraction_dagster.stages.index.stage import index_records, open_for_writing  # noqa: PLC0415

    settings, embeddings, made_with = extraction.settings, extraction.embedding_store(), extraction.fingerprints
    todo = _todo(plan)
    newest_first = reversed(embeddings.shards(id_range))
    shards = [(shard, records) for shard in newest_first if (records := _stored([shard], todo))]
    progress.begin("qdrant_points", len({record_id for _, records in shards for record_id in records}))
    num_points: dict[int, int] = {}
    failures: list[Failure] = []
    if not shards:
        return num_points, failures
    with open_point_store(settings, wait_seconds=settings.qdrant_timeout_seconds) as store:
        spec = CollectionSpec.of(settings, dim=shards[0][0].dim, fingerprint=made_with.embedding)
        open_for_writing(store, spec)
        for shard, records in shards:
            seen = num_points.keys() | {failure.record_id for failure in failures}
            wanted = [record_id for record_id in records if record_id not in seen]
            if not wanted:
                continue
            videos = {record_id: todo[record_id].video for record_id in wanted}
            indexed = index_records(
                store,
                embeddings.read(shard).of_records(wanted),
                rows=videos,
                generations={
                    record_id: generation(
                        embedding_fingerprint=made_with.embedding,
                        frames_fingerprint=made_with.frames,
                        content_version=video.content_version,
                    )
                    for record_id, video in videos.items()
                },
            )
            catalog.mark_done(plan, indexed.num_points, made_with)
            num_points |= indexed.num_points
            _write_failures(context, catalog, plan, indexed.failures)
            failures += indexed.failures
            _log.info("Marked %d records as embedded", len(indexed.num_points))
            progress.advance("qdrant_points", len(wanted))
    return num_points, failures


def _todo(plan: Mapping[int, "PlannedRow"]) -> dict[int, "PlannedRow"]:
    return {record_id: planned for record_id, planned in plan.items() if planned.status == "todo"}


def _concerns(failure: Failure, todo: Mapping[int, "PlannedRow"]) -> bool:
    """Whether a failure is one of a pending row in its present version."""
    planned = todo.get(failure.record_id)
    return planned is not None and planned.video.content_version == failure.content_version


def _stored(shards: Iterable[Any], todo: Mapping[int, "PlannedRow"]) -> dict[int, int]:
    """Frames by record, of the pending rows that a shard holds in their present version."""
    return {
        record.record_id: record.num_frames
        for shard in shards
        for record in shard.records
        if record.record_id in todo and record.content_version == todo[record.record_id].video.content_version
    }


def _unmarked(planned: "PlannedRow") -> bool:
    return planned.entry is None or planned.entry.state not in {"extracted", "embedded", "done"}


def _mark_extracted(
    catalog: "Catalog",
    plan: Mapping[int, "PlannedRow"],
    num_frames: Mapping[int, int],
    made_with: str,
) -> None:
    if num_frames:
        catalog.mark_extracted(plan, num_frames, made_with)
        _log.info("Marked %d records as extracted", len(num_frames))


def _write_failures(
    context: dg.AssetExecutionContext,
    catalog: "Catalog",
    plan: Mapping[int, "PlannedRow"],
    failures: Iterable[Failure],
) -> None:
    states = catalog.record_failures(plan, failures, run_id=context.run.run_id)
    for failure in failures:
        _log.warning("%s (%s)", failure.message, states[failure.record_id])


def _result(plan: Mapping[int, "PlannedRow"], counts: dict[str, Any], *, seconds: float) -> dg.MaterializeResult:  # type: ignore[type-arg]
    """Numbers that plot over time, and the failures as a table."""
    failures: list[Failure] = counts.pop("failures")
    statuses = [planned.status for planned in plan.values()]
    metadata: dict[str, Any] = {
        "records": len(plan),
        **counts,
        "failures": len(failures),
        "records_waiting": statuses.count("waiting"),
        "records_parked": statuses.count("parked"),
        "seconds": round(seconds, 3),
    }
    if failures:
        metadata["failures_table"] = dg.MetadataValue.table(
            [
                dg.TableRecord({"record": item.record_id, "error": item.error_type, "message": item.message})
                for item in failures[:_MOST_FAILURES_SHOWN]
            ]
        )
    return dg.MaterializeResult(metadata=metadata)
