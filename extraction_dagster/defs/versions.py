"""What makes a range of an asset stale: other settings (code version), or other content upstream (data version)."""

from collections.abc import Mapping

import dagster as dg

from extraction_dagster.records import fingerprint
from extraction_dagster.settings import Settings
from extraction_dagster.shards.frame_store import frames_fingerprint
from extraction_dagster.stages.catalog.ledger import LedgerEntry
from extraction_dagster.stages.embed.models.registry import embedding_settings_fingerprint

CODE_VERSION_TAG = "dagster/code_version"
# The states of a record that has what the asset makes.
_HAS = {
    "video_frames": {"extracted", "embedded", "done"},
    "frame_embeddings": {"embedded", "done"},
    "qdrant_points": {"done"},
}


def code_versions(settings: Settings) -> dict[str, str]:
    """The code version of each asset: the settings that decide what it holds, and no other.

    Dagster does not hand staleness on, so vectors and points carry the choice of frames as well: they differ with it.
    """
    frames, embedding = frames_fingerprint(settings), embedding_settings_fingerprint(settings)
    vectors = fingerprint(frames=frames, embedding=embedding)
    return {"video_frames": frames, "frame_embeddings": vectors, "qdrant_points": vectors}


def data_version(asset: str, entries: Mapping[int, LedgerEntry]) -> dg.DataVersion:
    """What a range of an asset holds: it stays when a run finds nothing to do, and changes with any record."""
    held = [_content(asset, entry) for _, entry in sorted(entries.items()) if entry.state in _HAS[asset]]
    return dg.DataVersion(fingerprint(asset=asset, records=held))


def _content(asset: str, entry: LedgerEntry) -> list[object]:
    content: list[object] = [entry.record_id, entry.content_version, entry.frames_fingerprint, entry.num_frames]
    return content if asset == "video_frames" else [*content, entry.embedding_fingerprint]
