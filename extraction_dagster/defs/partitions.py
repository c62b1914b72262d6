"""Partitions: one per contiguous range of ids, registered when a range is first run."""

import os
import socket
from collections.abc import Iterable, Iterator

import dagster as dg
import psutil

from extraction_dagster.errors import PartitionKeyError
from extraction_dagster.records import IdRange

# Dagster's pages leave tags of this prefix out: they would be noise beside each run.
PROCESS_TAG = ".dagster/extraction_process"
# A retry inherits its parent's tags: this one says of which run that is the process.
PROCESS_RUN_TAG = ".dagster/extraction_process_run"
FLOOR_TAG = "extraction/floor"
id_ranges = dg.DynamicPartitionsDefinition(name="id_ranges")


def above_floor(context: dg.AssetExecutionContext, id_range: IdRange) -> IdRange:
    """The part of a range that the operator's floor leaves; all of it in a run that people launched themselves."""
    floor_id = int(context.run.tags.get(FLOOR_TAG, id_range.first_id - 1))
    return IdRange(min(max(id_range.first_id, floor_id + 1), id_range.last_id), id_range.last_id)


def add_ranges(instance: dg.DagsterInstance, ranges: Iterable[IdRange]) -> None:
    """Register ranges; those that are known already stay."""
    instance.add_dynamic_partitions("id_ranges", [id_range.partition_key for id_range in ranges])


def valid_ranges(keys: Iterable[str]) -> Iterator[IdRange]:
    """Keys that are ranges; somebody may have added another by hand."""
    for key in keys:
        try:
            yield IdRange.parse(key)
        except PartitionKeyError:
            continue


def process_tags(run_id: str) -> dict[str, str]:
    """The tags that say that this process works on a run: host, process id, and start time, for ids are used again."""
    this_process = f"{socket.gethostname()}:{os.getpid()}:{int(psutil.Process().create_time())}"
    return {PROCESS_TAG: this_process, PROCESS_RUN_TAG: run_id}


def is_dead(tag: str) -> bool:
    """Whether a tag names a process of this host that is gone."""
    host, _, rest = tag.partition(":")
    number, _, started = rest.partition(":")
    if host != socket.gethostname() or not (number.isdecimal() and started.isdecimal()):
        return False
    return is_gone(int(number), since=int(started), until=int(started) + 1)


def is_gone(process_id: int, *, since: float = 0.0, until: float) -> bool:
    """Whether no process with this id that began between two moments lives; False where that can't be seen."""
    try:
        process = psutil.Process(process_id)
        return not since <= process.create_time() < until or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
