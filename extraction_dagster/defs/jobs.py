"""Jobs: what is launched for a range."""

import dagster as dg

from extraction_dagster.defs.partitions import id_ranges

extraction_job = dg.define_asset_job(
    name="extraction_job",
    selection=dg.AssetSelection.groups("extraction"),
    partitions_def=id_ranges,
    executor_def=dg.in_process_executor,
    description="Videos of one range of ids to verified points: video_frames, frame_embeddings, qdrant_points.",
)
