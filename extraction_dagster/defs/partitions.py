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


def this_process() -> str:
    """This process as a tag: host, process id and start time, for process ids are used again."""
    return f"{socket.gethostname()}:{os.getpid()}:{int(psutil.Process().create_time())}"


def process_tags(run_id: str) -> dict[str, str]:
    """The tags that say that this process works on a run."""
    return {PROCESS_TAG: this_process(), PROCESS_RUN_TAG: run_id}


def is_dead(tag: str) -> bool:
    """Whether a tag names a process of this host that is gone."""
    host, _, rest = tag.partition(":")
    number, _, started = rest.partition(":")
    if host != socket.gethostname() or not (number.isdecimal() and started.isdecimal()):
        return False
    try:
        process = psutil.Process(int(number))
        return int(process.create_time()) != int(started) or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
