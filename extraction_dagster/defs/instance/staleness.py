"""Which ranges are stale: what the UI shows range by range, asked for many ranges at once.

Dagster's own resolver asks the storage for each asset and range; here each asset costs a few queries for all of them.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from extraction_dagster.defs.instance.private_api import (
    BaseAssetGraph,
    extract_data_provenance_from_entry,
    extract_data_version_from_entry,
    newest_materializations,
)
from extraction_dagster.records import IdRange

_PAGE = 500


@dataclass(frozen=True, slots=True)
class _Made:
    """What the newest materialization of an asset's range says of itself."""

    storage_id: int
    code_version: str | None
    data_version: str
    inputs: Mapping[dg.AssetKey, tuple[int | None, str]]

    def is_newer_than_read_by(self, reader: "_Made", asset: dg.AssetKey) -> bool:
        """Whether a reader of this asset read an older materialization of it, and one with other contents."""
        storage_id, version = reader.inputs.get(asset, (None, ""))
        if storage_id is not None and self.storage_id <= storage_id:
            return False
        return hashlib.sha256(self.data_version.encode()).hexdigest() != version  # how Dagster names a single range


def stale_ranges(
    instance: dg.DagsterInstance, graph: BaseAssetGraph[Any], ranges: Sequence[IdRange], assets: Iterable[dg.AssetKey]
) -> set[IdRange]:
    """The ranges of which an asset is missing, was made by other code or settings, or from older inputs.

    Args:
        instance: Whose materializations.
        graph: The assets as they are now.
        ranges: Those asked about.
        assets: Those asked about.
    """
    wanted = set(assets)
    parents = {key: graph.get(key).parent_keys & _like(graph, key) for key in wanted}
    keys = [id_range.partition_key for id_range in ranges]
    made = {key: _newest(instance, key, set(keys)) for key in wanted.union(*parents.values())}
    return {
        id_range
        for id_range, name in zip(ranges, keys, strict=True)
        if any(_is_stale(graph, key, parents[key], made, name) for key in wanted)
    }


def _like(graph: BaseAssetGraph[Any], key: dg.AssetKey) -> set[dg.AssetKey]:
    """The assets that have a materialization for each of an asset's ranges."""
    partitions = graph.get(key).partitions_def
    return {other for other in graph.materializable_asset_keys if graph.get(other).partitions_def == partitions}


def _is_stale(
    graph: BaseAssetGraph[Any],
    key: dg.AssetKey,
    parents: Iterable[dg.AssetKey],
    made: Mapping[dg.AssetKey, Mapping[str, _Made]],
    partition_key: str,
) -> bool:
    mine = made[key].get(partition_key)
    if mine is None or mine.code_version != graph.get(key).code_version:
        return True
    sources = {parent: made[parent].get(partition_key) for parent in parents}
    return any(source is not None and source.is_newer_than_read_by(mine, parent) for parent, source in sources.items())


def _newest(instance: dg.DagsterInstance, asset: dg.AssetKey, partition_keys: set[str]) -> dict[str, _Made]:
    """The newest materialization of each range."""
    newest = newest_materializations(instance, asset)
    storage_ids = [number for key, number in newest.items() if key in partition_keys]
    return {key: made for page in _pages(storage_ids) for key, made in _read(instance, asset, page)}


def _read(instance: dg.DagsterInstance, asset: dg.AssetKey, storage_ids: Sequence[int]) -> Iterator[tuple[str, _Made]]:
    wanted = dg.AssetRecordsFilter(asset_key=asset, storage_ids=list(storage_ids))
    for record in instance.fetch_materializations(wanted, limit=len(storage_ids)).records:
        provenance = extract_data_provenance_from_entry(record.event_log_entry)
        version = extract_data_version_from_entry(record.event_log_entry)
        inputs = {}
        if provenance is not None:
            read = provenance.input_storage_ids
            inputs = {key: (read.get(key), value.value) for key, value in provenance.input_data_versions.items()}
        code_version = None if provenance is None else provenance.code_version
        made = _Made(record.storage_id, code_version, "" if version is None else version.value, inputs)
        yield record.partition_key or "", made


def _pages(items: Sequence[int]) -> Iterator[Sequence[int]]:
    return (items[start : start + _PAGE] for start in range(0, len(items), _PAGE))
