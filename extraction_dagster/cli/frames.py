"""`extraction frames`: take stored frames elsewhere, remove those that nobody needs, merge small shards."""

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from extraction_dagster.cli import console
from extraction_dagster.cli.arguments import AnyRange, Range
from extraction_dagster.records import IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog

if TYPE_CHECKING:
    from extraction_dagster.shards.retention import Removed

app = typer.Typer(
    help="Take the stored frames elsewhere; merge small shards, remove needless ones.\n\n"
    "For example: extraction frames export 1-1000 --to frames",
    no_args_is_help=True,
)

_PACKED = {".gz", ".tgz", ".zip", ".zst", ".xz", ".bz2"}
_MIB = 2**20


@app.command()
def export(
    id_range: Range,
    *,
    to: Annotated[
        Path, typer.Option("--to", metavar="FOLDER|OUT.tar", help="A new folder of JPEGs, or a WebDataset tar.")
    ],
    as_json: console.AsJson = False,
) -> None:
    """Write the stored frames of a range as JPEG files with a table (frames.csv), or as one WebDataset tar.

    For example: extraction frames export 1-1000 --to frames
    """
    from extraction_dagster.shards.frame_export import export_frames
    from extraction_dagster.shards.frame_store import FrameStore
    from extraction_dagster.shards.place import Source
    from extraction_dagster.stages.decode.fingerprint import frames_fingerprint

    if to.suffix.lower() in _PACKED:
        raise typer.BadParameter(f"--to expects a folder or a name that ends in .tar, not {to.suffix}")
    settings = load_settings()
    source = Source.for_reading(settings)
    store = FrameStore(settings.resolved_frames_uri, frames_fingerprint(settings), source=source)
    with console.counting("videos") as count:
        videos, frames = export_frames(store, id_range, to, on_video=count)
    say = console.Answer(as_json)
    say.text(f"Wrote {frames} frames of {videos} videos to {to}")
    say.document({"to": str(to), "frames": frames, "videos": videos})


@app.command()
def prune(id_range: AnyRange = None, *, as_json: console.AsJson = False) -> None:
    """Remove frame shards whose records are all done, when EXTRACTION_KEEP_FRAMES says that they go.

    With them go the frames and vectors of former settings, once their records are done with today's.

    For example: extraction frames prune
    """
    from extraction_dagster.ranges.work import fingerprints_of, open_stores
    from extraction_dagster.shards.place import Source
    from extraction_dagster.shards.retention import Removed, keep_time, prune_former, prune_frames

    settings, say = load_settings(), console.Answer(as_json)
    keep = keep_time(settings.keep_frames)
    if keep is None:
        say.text("EXTRACTION_KEEP_FRAMES is 'all': every frame stays. Set it to none, or to a number of days.")
        say.document({"keep_frames": settings.keep_frames, **_removed(Removed(), Removed())})
        return
    made_with = fingerprints_of(settings)
    of_today, of_former = Removed(), Removed()
    with open_catalog(settings) as catalog:
        frames, vectors = open_stores(settings, made_with, Source(catalog.source.identity, catalog.source.name))
        for partition in _enclosed({*frames.every_partition(), *vectors.every_partition()}, id_range):
            entries = catalog.ledger.entries(partition)
            of_today += prune_frames(frames, partition, entries, made_with, keep=keep)
            of_former += prune_former(frames, partition, entries, made_with, keep=keep)
            of_former += prune_former(vectors, partition, entries, made_with, keep=keep)
    say.text(f"Removed {of_today.shards} frame shards, {of_today.num_bytes / _MIB:.1f} MiB")
    if of_former.shards:
        say.text(f"Removed {of_former.shards} shards of former settings, {of_former.num_bytes / _MIB:.1f} MiB")
    say.document({"keep_frames": settings.keep_frames, **_removed(of_today, of_former)})


def _removed(of_today: "Removed", of_former: "Removed") -> dict[str, int]:
    of_former_settings = {"former_shards": of_former.shards, "former_bytes": of_former.num_bytes}
    return {"frame_shards": of_today.shards, "frame_bytes": of_today.num_bytes, **of_former_settings}


@app.command()
def compact(
    id_range: AnyRange = None,
    *,
    older_than: Annotated[
        float,
        typer.Option(min=0, metavar="MINUTES", help="Leave younger shards alone, which a run may be about to read."),
    ] = 60.0,
    as_json: console.AsJson = False,
) -> None:
    """Merge the small shards of frames and of vectors that killed runs and a slow trickle of rows leave behind.

    For example: extraction frames compact --older-than 120
    """
    from extraction_dagster.ranges.work import fingerprints_of, open_stores
    from extraction_dagster.shards.compaction import Compacted, CompactionOptions
    from extraction_dagster.shards.compaction import compact as compact_shards
    from extraction_dagster.shards.place import Source

    settings = load_settings()
    made_with = fingerprints_of(settings)
    options = CompactionOptions(settings.shard_records, enough_shards=2, untouched=timedelta(minutes=older_than))
    of_frames, of_vectors = Compacted(), Compacted()
    with open_catalog(settings) as catalog:
        source = Source(catalog.source.identity, catalog.source.name)
        frames, vectors = open_stores(settings, made_with, source)
        for partition in _enclosed({*frames.partitions(), *vectors.partitions()}, id_range):
            of_frames += compact_shards(frames, partition, options, entries=catalog.ledger.entries(partition))
            of_vectors += compact_shards(vectors, partition, options)
    say, merged = console.Answer(as_json), {"frame": of_frames, "embedding": of_vectors}
    for what, done in merged.items():
        say.text(f"{done.removed} {what} shards became {done.written}")
    say.document({f"{what}_shards": {"merged": it.removed, "written": it.written} for what, it in merged.items()})


def _enclosed(partitions: Iterable[IdRange], within: IdRange | None) -> list[IdRange]:
    """Ranges that lie in the named one as a whole, in ascending order: others hold records that are not named."""
    return sorted(
        found for found in partitions if within is None or (found.first_id in within and found.last_id in within)
    )
