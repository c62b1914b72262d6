"""A few embedding shards in place of many small ones; see `decode.compaction`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors.shards import EmbeddingShardError
from extraction_dagster.records import EmbeddingBatch
from extraction_dagster.shards.compaction import Compacted, plan_compaction
from extraction_dagster.shards.names import merged_name

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from extraction_dagster.records import IdRange
    from extraction_dagster.shards.compaction import CompactionOptions
    from extraction_dagster.shards.embedding_store import EmbeddingShard, EmbeddingStore

_log = logging.getLogger(__name__)


def compact_embeddings(store: EmbeddingStore, partition: IdRange, options: CompactionOptions) -> Compacted:
    """Merge a range's small embedding shards.

    A merged shard bears no frame shard's name: whether a record has vectors is asked of records, not of names.

    Args:
        store: The vectors.
        partition: The range.
        options: What is worth a merge.
    """
    plan = plan_compaction(store.shards(partition), options)
    for shard in plan.superseded:
        store.remove(shard)
    done = Compacted(removed=len(plan.superseded))
    for group in plan.groups:
        try:
            _merge(store, partition, group, [plan.live(shard) for shard in group])
        except EmbeddingShardError as error:  # removed meanwhile, or damaged: whoever needs it says so
            _log.warning("Small embedding shards of range %s stay as they are: %s", partition, error)
            continue
        for shard in group:
            store.remove(shard)
        done += Compacted(removed=len(group), written=1)
    return done


def _merge(
    store: EmbeddingStore, partition: IdRange, group: Sequence[EmbeddingShard], live: Sequence[Collection[int]]
) -> None:
    batches = [store.read(shard).of_records(kept) for shard, kept in zip(group, live, strict=True)]
    held = [
        (record.record_id, record.content_version)
        for shard, kept in zip(group, live, strict=True)
        for record in shard.records
        if record.record_id in kept
    ]
    failed = {failure.record_id: failure for shard in group for failure in shard.failures}
    whole = EmbeddingBatch(
        vectors=np.concatenate([batch.vectors for batch in batches]),
        record_id=np.concatenate([batch.record_id for batch in batches]),
        frame_number=np.concatenate([batch.frame_number for batch in batches]),
        pts_seconds=np.concatenate([batch.pts_seconds for batch in batches]),
    )
    name = merged_name([shard.name for shard in group])
    store.write(partition, name, whole, versions=held, failures=list(failed.values()))
