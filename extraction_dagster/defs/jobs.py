"""Jobs: what is launched for a range."""

from typing import Any

import dagster as dg

_CHAIN = ("video_frames", "frame_embeddings", "qdrant_points")
# It compares every range, in reconcile_job.
_COMPARISON = dg.AssetCheckKey(dg.AssetKey("qdrant_points"), "points_agree_with_table")
# Runs that people launch over many ranges wait for those that new rows ask for.
_LOW_PRIORITY = {"dagster/priority": "-1"}


def _job(name: str, *assets: str, description: str, tags: dict[str, str] | None = None) -> Any:  # noqa: ANN401 - Dagster has no public name
    selection = dg.AssetSelection.assets(*assets) - dg.AssetSelection.checks(_COMPARISON)
    executor = dg.in_process_executor
    return dg.define_asset_job(name, selection, executor_def=executor, tags=tags, description=description)


extraction_job = _job(
    "extraction_job",
    *_CHAIN,
    description="Videos of one range of ids to verified points: video_frames, frame_embeddings, qdrant_points.",
)
embedding_job = _job(
    "embedding_job",
    *_CHAIN[1:],
    tags=_LOW_PRIORITY,
    description="Stored frames of one range to verified points, without decoding: after a change of the model. With "
    "`force`, whatever there is already.",
)
indexing_job = _job(
    "indexing_job",
    *_CHAIN[2:],
    tags=_LOW_PRIORITY,
    description="Stored vectors of one range to verified points, without embedding. With `force`, whatever there is "
    "already: after a change of the payload columns, say.",
)
