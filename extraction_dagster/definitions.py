"""Open this first: everything that Dagster sees, in data order."""

import dagster as dg

from extraction_dagster.defs.assets import frame_embeddings, qdrant_points, source_table, video_frames
from extraction_dagster.defs.jobs import embedding_job, extraction_job, indexing_job
from extraction_dagster.defs.notify import run_failure_notices
from extraction_dagster.defs.progress import extraction_progress, progress_sensor, watermark_moves
from extraction_dagster.defs.reconcile import points_agree_with_table, reconcile_job, reconcile_schedule
from extraction_dagster.defs.resources import Extraction
from extraction_dagster.defs.sensors import extraction_sensor, history_sensor

defs = dg.Definitions(
    assets=[source_table, video_frames, frame_embeddings, qdrant_points, extraction_progress],
    asset_checks=[points_agree_with_table, watermark_moves],
    jobs=[extraction_job, embedding_job, indexing_job, reconcile_job],
    schedules=[reconcile_schedule],
    sensors=[extraction_sensor, progress_sensor, run_failure_notices, history_sensor],
    resources={"extraction": Extraction()},
    executor=dg.in_process_executor,  # of runs that a backfill asks for: one process a range costs a quarter
)
