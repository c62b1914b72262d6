"""Jobs: what is launched for a range."""

import dagster as dg

extraction_job = dg.define_asset_job(
    name="extraction_job",
    selection=dg.AssetSelection.groups("extraction").without_checks(),  # the check looks at every range: reconcile_job
    executor_def=dg.in_process_executor,
    description="Videos of one range of ids to verified points: video_frames, frame_embeddings, qdrant_points.",
)
