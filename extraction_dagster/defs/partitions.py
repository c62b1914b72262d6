"""Partitions: one per contiguous range of ids, registered as ranges come into being."""

import dagster as dg

from extraction_dagster.records import IdRange

id_ranges = dg.DynamicPartitionsDefinition(name="id_ranges")


def register(instance: dg.DagsterInstance, key: str) -> IdRange:
    """Make a range known to the instance, so that any valid range can be launched without preparation.

    Raises:
        PartitionKeyError: The key is no range of ids.
    """
    id_range = IdRange.parse(key)
    instance.add_dynamic_partitions("id_ranges", [id_range.partition_key])
    return id_range
