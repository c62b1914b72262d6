"""`extraction demo`: the whole way of the data, on videos made on the spot."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction_dagster.cli import console
from extraction_dagster.cli.search import hits_table, search_image
from extraction_dagster.demo.table import DemoQuery, choose_query, make_table, refuse_foreign_targets
from extraction_dagster.demo.videos import DemoVideo, make_videos, real_clips_hint
from extraction_dagster.errors.runs import RunFailedError
from extraction_dagster.records import IdRange
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.catalog.ranges import cut_backlog
from extraction_dagster.stages.index.stage import open_point_store

if TYPE_CHECKING:
    from extraction_dagster.defs.instance.launching import FinishedRun

_BATCH_SIZE = 12
_UI = "make ui" if Path("Makefile").exists() else "extraction init; DAGSTER_HOME=$PWD dagster dev -w workspace.yaml"


@dataclass(slots=True)
class _Work:
    """What this call did, for the summary."""

    runs: dict[IdRange, "FinishedRun"] = field(default_factory=dict)
    seconds: float = 0.0
    finished: int = 0


def command(*, as_json: console.AsJson = False) -> None:
    """Build a table of videos, process it through Dagster over several ranges of ids, and search it by image.

    Safe to repeat: what is done is not done again. Everything lies under EXTRACTION_HOME (default ./.extraction).

    For example: extraction demo
    """
    say = console.Answer(as_json)
    os.environ.setdefault("EXTRACTION_MAX_ATTEMPTS", "1")  # the broken videos stay broken: park them at once
    settings = load_settings()
    refuse_foreign_targets(settings)
    videos = _prepare(settings, say)
    work = _process(settings)
    document = _report(settings, work, say)
    say.document(document | _search(settings, choose_query(settings.home, videos), say))
    _next_steps(settings, videos, say)


def _prepare(settings: Settings, say: console.Answer) -> list[DemoVideo]:
    with console.counting("videos") as count:
        videos = make_videos(settings.home / "videos", on_finished=count)
    added = make_table(settings.resolved_source_url, videos)
    say.text(f"Source table {settings.source_table!r}: {len(videos)} videos, {added} of them new.")
    return videos


def _process(settings: Settings) -> _Work:
    from extraction_dagster.defs.instance.launching import launch, open_instance

    work, started = _Work(), time.perf_counter()
    with open_catalog(settings) as catalog:
        ranges = list(cut_backlog(catalog.source, _BATCH_SIZE))
        pending = [id_range for id_range in ranges if catalog.num_pending(id_range)]
        before = catalog.status()
    with open_instance(settings) as instance, console.long_work():
        for id_range in pending:
            work.runs[id_range] = launch(instance, id_range)
            if not work.runs[id_range].success:
                run = work.runs[id_range]
                raise RunFailedError(id_range.partition_key, run.run_id, run.error)
    with open_catalog(settings) as catalog:
        after = catalog.status()
    work.finished = sum(int(after[state] or 0) - int(before[state] or 0) for state in ("done", "failed", "parked"))
    work.seconds = time.perf_counter() - started
    return work


def _report(settings: Settings, work: _Work, say: console.Answer) -> dict[str, Any]:
    """What there is now, read from the table and the store, not from memory."""
    with open_catalog(settings) as catalog, open_point_store(settings) as store:
        status, failures = catalog.status(), catalog.ledger.errors(limit=20)
        frames, _ = catalog.ledger.totals()
        store.open_collection(settings.collection_name)
        points = store.count()
    values = (
        ("ranges processed now", ", ".join(map(str, work.runs)) or "none"),
        ("records processed now", work.finished),
        ("seconds", f"{work.seconds:.1f}"),
        ("videos in the table", status["eligible"]),
        ("videos done", status["done"]),
        ("frames stored", frames),
        ("points in Qdrant", points),
        ("videos that failed", len(failures)),
    )
    say.values(values, title="The demo's collection")
    for failure in failures:
        say.text(f"  {failure.state}: {failure.error_message}")
    if not work.finished:
        say.text("Processed 0 records: everything was done already.")
    return {name.replace(" ", "_"): value for name, value in values} | {"ranges_processed_now": [*map(str, work.runs)]}


def _search(settings: Settings, query: DemoQuery, say: console.Answer) -> dict[str, Any]:
    hits = search_image(settings, query.image, limit=5)
    say.text(f"\nWhich videos look like {query.image}? (a degraded frame of record {query.record_id})")
    say.table(hits_table(hits))
    right = bool(hits) and hits[0].record_id == query.record_id
    say.text("The first hit is the right video." if right else "The first hit is NOT the right video.")
    return {"query": str(query.image), "query_record_id": query.record_id, "first_hit_is_right": right}


def _next_steps(settings: Settings, videos: list[DemoVideo], say: console.Answer) -> None:
    hint = real_clips_hint(videos)
    if hint:
        say.text(hint)
    say.text(
        "\nNext:\n"
        "  extraction status                         how far things are\n"
        "  extraction errors                         which records failed, and why\n"
        f"  extraction search --image {settings.home / 'query.jpg'}\n"
        f"  {_UI:<40}  the same data in Dagster's UI"
    )
