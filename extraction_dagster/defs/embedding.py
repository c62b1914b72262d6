"""What frame_embeddings does with its range."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from extraction_dagster import progress
from extraction_dagster.defs.metadata import Stopwatch
from extraction_dagster.defs.range_work import RangeWork, Report, lacking, stored, was_done
from extraction_dagster.errors.runs import FramesMissingError
from extraction_dagster.records import Failure

if TYPE_CHECKING:
    from extraction_dagster.shards.embedding_store import EmbeddingShard, EmbeddingStore
    from extraction_dagster.stages.catalog.catalog import PlannedRow


def embed_range(work: RangeWork) -> Report:
    """Embed the frame shards that hold a pending row and have no vectors yet; in a forced run, all of them.

    Raises:
        FramesMissingError: Rows that were done before are to be embedded anew, and their frames are not stored.
    """
    watch, report, due = Stopwatch(), Report(), work.due
    frames, store = work.extraction.frame_store(), work.extraction.embedding_store()
    there = {} if work.extraction.force else stored(store.shards(work.id_range), due)
    wanted = [shard for shard in frames.shards(work.id_range) if stored([shard], due).keys() - there]
    progress.begin("frame_embeddings", sum(len(shard.records) for shard in wanted))
    num_frames = num_bytes = 0
    written: list[EmbeddingShard] = []
    for done in _embedded(work, wanted, watch) if wanted else ():
        failed = [item for item in done.failures if _concerns(item, due)]
        work.write_failures(failed)
        report.failures += failed
        num_frames, num_bytes = num_frames + done.num_frames, num_bytes + 2 * done.shard.dim * done.num_frames
        written.append(done.shard)
        progress.advance("frame_embeddings", len(done.shard.records) + len(done.failures))
    with watch.phase("verify"):
        report.unnormalised = _count_unnormalised(store, written)
    have = there | stored(written, due)
    missing = lacking(due, {*have, *(failure.record_id for failure in report.failures)})
    if not report.unnormalised:
        work.catalog.mark_embedded(_unmarked(work, have), work.made_with.embedding)
    if again := [record_id for record_id in missing if was_done(due[record_id])]:
        raise FramesMissingError(work.id_range.partition_key, again)
    report.numbers = {
        "videos": len(have),
        "videos_without_frames": len(missing),
        "frames": num_frames,
        "bytes": num_bytes,
        "shards": len(wanted),
        **watch.numbers(own=("load", "embed", "verify"), num_frames=num_frames),
    }
    return report


def _embedded(work: RangeWork, wanted: list[Any], watch: Stopwatch) -> Iterator[Any]:
    from extraction_dagster.stages.embed.models.registry import load_model  # noqa: PLC0415 - loads torch
    from extraction_dagster.stages.embed.stage import embed_shards  # noqa: PLC0415

    with watch.phase("load"):
        model = load_model(work.settings)
    for done in embed_shards(
        wanted,
        frames=work.extraction.frame_store(),
        store=work.extraction.embedding_store(),
        model=model,
        partition=work.id_range,
        settings=work.settings,
        reuse=not work.extraction.force,
    ):
        watch.add("embed", done.cpu_seconds)
        yield done


def _count_unnormalised(store: "EmbeddingStore", shards: "Iterable[EmbeddingShard]") -> int:
    from extraction_dagster.stages.embed.vectors import count_unnormalised  # noqa: PLC0415 - beside the model

    return sum(count_unnormalised(store.read(shard).vectors) for shard in shards)


def _unmarked(work: RangeWork, have: Iterable[int]) -> list[int]:
    """Those that the ledger does not know as embedded yet: a run that only tries again writes nothing."""
    wanted = ("embedded", work.made_with.embedding)
    known = {key: (item.entry.state, item.entry.embedding_fingerprint) for key, item in work.plan.items() if item.entry}
    return [record_id for record_id in have if known.get(record_id) != wanted]


def _concerns(failure: Failure, due: Mapping[int, "PlannedRow"]) -> bool:
    """Whether a failure is one of a due row in its present version."""
    planned = due.get(failure.record_id)
    return planned is not None and planned.video.content_version == failure.content_version
