"""Jobs: what is launched for a range."""

import json
from typing import Any

import dagster as dg

from extraction_dagster.settings import Settings, load_settings

_CHAIN = ("video_frames", "frame_embeddings", "qdrant_points")
# It compares every range, in reconcile_job.
_COMPARISON = dg.AssetCheckKey(dg.AssetKey("qdrant_points"), "points_agree_with_table")
# Runs that people launch over many ranges wait for those that new rows ask for.
_LOW_PRIORITY = {"dagster/priority": "-1"}


def pod_tags(settings: Settings, *, embeds: bool) -> dict[str, str]:
    """The tag by which Dagster's K8sRunLauncher shapes the pod of a run; none where no setting asks for one.

    It has to be the run's: tags of assets count under k8s_job_executor alone, which heeds no tags of runs.

    Args:
        settings: Those of `Pods of runs, on Kubernetes`.
        embeds: Whether the run embeds: GPUs, and the nodes that have them, are for such runs.

    Source:
        dagster-k8s, `get_user_defined_k8s_config`.
    """
    amounts: dict[str, str] = {"cpu": settings.run_cpu or "", "memory": settings.run_memory or ""}
    pod: dict[str, Any] = {}
    if embeds:
        amounts["nvidia.com/gpu"] = str(settings.run_gpus or "")
        pod = {"node_selector": settings.run_node_selector, "tolerations": settings.run_tolerations}
        pod = {name: json.loads(text) for name, text in pod.items() if text is not None}
    amounts = {name: amount for name, amount in amounts.items() if amount}
    labels = {"kueue.x-k8s.io/queue-name": settings.run_queue} if settings.run_queue else {}
    config = {
        "container_config": {"resources": {"requests": amounts, "limits": amounts}} if amounts else {},
        "pod_spec_config": pod,
        "job_metadata": {"labels": labels} if labels else {},
    }
    config = {part: value for part, value in config.items() if value}
    return {"dagster-k8s/config": json.dumps(config, sort_keys=True)} if config else {}


def _job(name: str, *assets: str, description: str, tags: dict[str, str] | None = None) -> Any:  # noqa: ANN401 - Dagster has no public name
    selection = dg.AssetSelection.assets(*assets) - dg.AssetSelection.checks(_COMPARISON)
    executor = dg.in_process_executor
    # Of every run of the job, by whatever it was asked for: sensor, launchpad, command, backfill of the job.
    tags = {**(tags or {}), **pod_tags(load_settings(), embeds="frame_embeddings" in assets)}
    return dg.define_asset_job(name, selection, executor_def=executor, tags=tags or None, description=description)


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
