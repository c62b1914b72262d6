"""Jobs: what is launched for a range."""

import dagster as dg

_CHAIN = ("video_frames", "frame_embeddings", "qdrant_points")
# It compares every range, in reconcile_job.
_COMPARISON = dg.AssetCheckKey(dg.AssetKey("qdrant_points"), "points_agree_with_table")
# Runs that people launch over many ranges wait for those that new rows ask for.
_LOW_PRIORITY = {"dagster/priority": "-1"}


def _select(*assets: str) -> dg.AssetSelection:
    return dg.AssetSelection.assets(*assets) - dg.AssetSelection.checks(_COMPARISON)


extraction_job = dg.define_asset_job(
    name="extraction_job",
    selection=_select(*_CHAIN),
    executor_def=dg.in_process_executor,
    description="Videos of one range of ids to verified points: video_frames, frame_embeddings, qdrant_points.",
)

embedding_job = dg.define_asset_job(
    name="embedding_job",
    selection=_select(*_CHAIN[1:]),
    executor_def=dg.in_process_executor,
    tags=_LOW_PRIORITY,
    description="Stored frames of one range to verified points, without decoding: after a change of the model. With "
    "`force`, whatever there is already.",
)

indexing_job = dg.define_asset_job(
    name="indexing_job",
    selection=_select(*_CHAIN[2:]),
    executor_def=dg.in_process_executor,
    tags=_LOW_PRIORITY,
    description="Stored vectors of one range to verified points, without embedding. With `force`, whatever there is "
    "already: after a change of the payload columns, say.",
)
