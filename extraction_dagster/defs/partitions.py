"""Partitions: one per contiguous range of ids, registered when a range is first run."""

import functools
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import dagster as dg

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
    """The tags that say that this process works on a run: place, process id, and start time, for ids are used again."""
    import psutil

    this_process = f"{_place()}:{os.getpid()}:{int(psutil.Process().create_time())}"
    return {PROCESS_TAG: this_process, PROCESS_RUN_TAG: run_id}


@functools.cache
def _place() -> str:
    """Where a process id means what it means here: the host's name, and what tells its kernel and container.

    A container's successor may have another name and see the same processes, or the same name and see others.
    """
    facts = ""
    with suppress(OSError):  # Linux has both
        facts = (
            f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}.{Path('/proc/self/ns/pid').stat().st_ino}"
        )
    return f"{socket.gethostname()}/{facts}"


def host_of(tag: str) -> str:
    """The name of the host on which the process of a tag works; empty for no tag."""
    return tag.partition(":")[0].partition("/")[0]


def is_here(tag: str) -> bool:
    """Whether the process that a tag names would be seen from here."""
    (host, _, facts), (own_host, _, own_facts) = (place.partition("/") for place in (tag.partition(":")[0], _place()))
    return facts == own_facts if facts and own_facts else host == own_host


def is_dead(tag: str) -> bool:
    """Whether a tag names a process that would be seen from here, and is gone."""
    number, _, started = tag.partition(":")[2].partition(":")
    if not is_here(tag) or not (number.isdecimal() and started.isdecimal()):
        return False
    return is_gone(int(number), since=int(started), until=int(started) + 1)


def is_gone(process_id: int, *, since: float = 0.0, until: float) -> bool:
    """Whether no process with this id that began between two moments lives; False where that can't be seen."""
    import psutil

    try:
        process = psutil.Process(process_id)
        return not since <= process.create_time() < until or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
