"""What a server says of itself and of the collection, for `extraction doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from extraction_dagster.errors.index import CollectionMissingError, PointStoreError
from extraction_dagster.stages.index.server.limits import shown
from extraction_dagster.stages.index.server.store import ServerStore
from extraction_dagster.stages.index.stage import open_point_store

if TYPE_CHECKING:
    from extraction_dagster.settings import Settings

_MEANING = {
    "green": "all is indexed",
    "yellow": "it is being indexed: searches find everything, and take longer",
    "grey": "indexing waits for the next write, as after a restart: searches find everything, and take longer",
    "red": "indexing failed: see the server's log",
}


def describe(settings: Settings) -> str:
    """The server's version and address, and the collection: its status, points, limits, peers.

    Raises:
        PointStoreError: The server or the collection can't be used.
    """
    store = open_point_store(settings)
    if not isinstance(store, ServerStore):
        raise TypeError(type(store))
    with store:
        version = store.ask("ask for its version", lambda client: client.info()).version
        said = f"server {version} at {store.where}; collection {settings.collection_name}"
        try:
            store.open_collection(settings.collection_name)
        except CollectionMissingError:
            return f"{said} is made by the first run"
        target = store.target
        info = store.ask("look up a collection", lambda client: client.get_collection(target))
        try:
            cluster = store.ask("ask for its peers", lambda client: client.collection_cluster_info(target))
        except PointStoreError:  # a key without that right, or a server without that call
            return f"{said} is {target}: {_collection(info)}"
        return f"{said} is {target}: {_collection(info)}; {_cluster(cluster)}"


def _collection(info: Any) -> str:  # noqa: ANN401 - the client's own record
    status, points = info.status.value, info.points_count or 0
    error = getattr(info.optimizer_status, "error", None)
    parts = [
        f"{status} ({error or _MEANING.get(status, 'a status that is not known here')})",
        f"about {points} points",
        f"{min(1.0, (info.indexed_vectors_count or 0) / points):.0%} of their vectors in the search index"
        if points
        else "",
        shown(info.config),
    ]
    return ", ".join(filter(None, parts))


def _cluster(found: Any) -> str:  # noqa: ANN401 - the client's own record
    """Peers and replicas, as the peer that was asked knows them."""
    replicas = [*found.local_shards, *found.remote_shards]
    peers = {found.peer_id, *(shard.peer_id for shard in found.remote_shards)}
    states = [shard.state.value for shard in replicas]
    others = sorted({state for state in states if state != "Active"})
    more = f", others {', '.join(others)}" if others else ""
    active = f"{states.count('Active')} of {len(states)} replicas active{more}"
    return f"{len(peers)} peers, {found.shard_count} shards, {active}"
