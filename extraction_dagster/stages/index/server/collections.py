"""The server's collections: which one a name stands for, what it holds, and changing that."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from extraction_dagster.errors.index import (
    CollectionInUseError,
    CollectionMissingError,
    CollectionNameTakenError,
    StoreRefusedError,
)
from extraction_dagster.stages.index.protocol import PAYLOAD_INDEXES, CollectionSpec
from extraction_dagster.stages.index.server.retry import is_already_there, require_completed

if TYPE_CHECKING:
    from collections.abc import Callable

    from qdrant_client import QdrantClient

_Result = TypeVar("_Result")
_METADATA_KEY = "extraction"
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
_log = logging.getLogger(__name__)


class _Call(Protocol):
    """Make a call to the server, and repeat it while its failure is temporary."""

    def __call__(self, operation: str, function: Callable[[], _Result], /) -> _Result: ...


@dataclass(frozen=True, slots=True)
class ServerCollections:
    """Collections and aliases of a server; every method can be repeated after any failure."""

    client: QdrantClient
    url: str
    call: _Call

    def behind(self, name: str) -> str | None:
        """The collection that a name stands for: an alias' target, or a collection with exactly that name."""
        aliases = self.call("list aliases", self.client.get_aliases).aliases
        found = {alias.alias_name: alias.collection_name for alias in aliases}
        return found.get(name) or (name if self.exists(name) else None)

    def exists(self, target: str) -> bool:
        """Whether there is a collection with exactly this name."""
        return bool(self.call("look up a collection", lambda: self.client.collection_exists(target)))

    def under(self, name: str) -> dict[str, bool]:
        """The fingerprints under a name, and whether each is the one that the name stands for."""
        current = self.behind(name)
        found = self.call("list collections", self.client.get_collections).collections
        prefix = f"{name}-"
        names = sorted(item.name for item in found if item.name.startswith(prefix))
        return {item.removeprefix(prefix): item == current for item in names if self._belongs(item, name)}

    def is_under(self, target: str, name: str) -> bool:
        """Whether there is such a collection, and it is one of this name, not of a neighbour's: `name-staging`."""
        return self.exists(target) and self._belongs(target, name)

    def _belongs(self, target: str, name: str) -> bool:
        """Whether a collection that begins with a name is of that name: as it says itself, or else by its pattern."""
        fingerprint = target.removeprefix(f"{name}-")
        try:
            metadata = self._metadata(self._config(target))
        except StoreRefusedError:  # a key that is for other collections, or dropped since it was listed
            metadata = {}
        if metadata:
            return bool((metadata.get("name"), metadata.get("fingerprint")) == (name, fingerprint))
        return _FINGERPRINT.fullmatch(fingerprint) is not None

    def _config(self, target: str) -> Any:  # noqa: ANN401 - the client's own record
        return self.call("look up a collection", lambda: self.client.get_collection(target)).config

    @staticmethod
    def _metadata(config: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
        return dict((config.metadata or {}).get(_METADATA_KEY) or {})

    def spec(self, target: str, name: str) -> CollectionSpec:
        """What a collection says of itself; on a server without metadata its full name carries the fingerprint."""
        config = self._config(target)
        metadata = self._metadata(config)
        vectors: Any = config.params.vectors
        fingerprint = str(metadata.get("fingerprint") or target.removeprefix(f"{name}-"))
        is_half = vectors.datatype is not None and vectors.datatype.value == "float16"
        return CollectionSpec(
            name,
            int(vectors.size),
            fingerprint,
            "float16" if is_half else "float32",
            "none" if (vectors.quantization_config or config.quantization_config) is None else "scalar",
            on_disk=bool(vectors.on_disk),
            source=str(metadata.get("source") or ""),
        )

    def note_source(self, target: str, spec: CollectionSpec, source: str) -> CollectionSpec:
        """Keep a source's identity in a collection's metadata; returns what the collection says of itself now.

        A server that keeps no metadata, or a key that may not change it, is warned of: runs go on as before.
        """
        kept = {"v": 1, "name": spec.name, "fingerprint": spec.fingerprint, "source": source}
        try:
            self.call(
                "note a collection's source",
                lambda: self.client.update_collection(target, metadata={_METADATA_KEY: kept}),
            )
            found = self.spec(target, spec.name)
        except StoreRefusedError as error:
            found, why = spec, str(error)
        else:
            why = "the server keeps no metadata"
        if not found.source:
            _log.warning("Collection %r can't be told from another source's: %s", target, why)
        return found

    def ensure(
        self, target: str, spec: CollectionSpec, require_own: Callable[[CollectionSpec], None]
    ) -> CollectionSpec:
        """Create a collection and its payload indexes where they are missing. Returns what it says of itself.

        Raises:
            ForeignCollectionError: It is not our own, as `require_own` says.
            CollectionMismatchError: It holds other vectors.
        """
        if not self.exists(target):
            self._create(target, spec)
        found = self.spec(target, spec.name)
        require_own(found)
        spec.require_same_vectors(found, self.url)
        info = self.call("look up a collection", lambda: self.client.get_collection(target))
        for field, kind in PAYLOAD_INDEXES.items():
            if field not in (info.payload_schema or {}):
                self._create_index(target, field, kind)
        return found

    def publish(self, name: str, target: str) -> None:
        """Let a name stand for a collection, in one step on the server.

        Raises:
            CollectionNameTakenError: A collection has that very name, so that it can't become an alias.
        """
        from qdrant_client import models

        current = self.behind(name)
        if current == target:
            return
        if current == name:
            raise CollectionNameTakenError(name, self.url)
        operations: list[Any] = []
        if current is not None:
            operations.append(models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=name)))
        create = models.CreateAlias(collection_name=target, alias_name=name)
        operations.append(models.CreateAliasOperation(create_alias=create))
        self.call("publish a collection", lambda: self.client.update_collection_aliases(operations))

    def drop(self, name: str, target: str, require_own: Callable[[CollectionSpec], None]) -> None:
        """Remove a collection.

        Raises:
            CollectionInUseError: The name stands for it.
            CollectionMissingError: There is none.
            ForeignCollectionError: It is not our own, as `require_own` says.
        """
        if self.behind(name) == target:
            raise CollectionInUseError(target, self.url)
        if not self.is_under(target, name):
            raise CollectionMissingError(target, self.url)
        require_own(self.spec(target, name))
        self.call("drop a collection", lambda: self.client.delete_collection(target))

    def _create(self, target: str, spec: CollectionSpec) -> None:
        from qdrant_client import models

        int8 = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, always_ram=True)
        vectors = models.VectorParams(
            size=spec.dim,
            distance=models.Distance.COSINE,
            datatype=models.Datatype(spec.vector_dtype),
            on_disk=spec.on_disk or None,
            quantization_config=models.ScalarQuantization(scalar=int8) if spec.quantization == "scalar" else None,
        )
        metadata: dict[str, Any] = {"v": 1, "name": spec.name, "fingerprint": spec.fingerprint}
        if spec.source:
            metadata["source"] = spec.source

        def create() -> None:
            try:
                self.client.create_collection(target, vectors_config=vectors, metadata={_METADATA_KEY: metadata})
            except Exception as error:
                # Another run created it meanwhile, or an earlier try of ours whose answer was lost.
                if not is_already_there(error):
                    raise

        self.call("create a collection", create)

    def _create_index(self, target: str, field: str, kind: str) -> None:
        from qdrant_client import models

        schema = models.PayloadSchemaType(kind)
        self.call(
            "create a payload index",
            lambda: require_completed(self.client.create_payload_index(target, field, field_schema=schema, wait=True)),
        )
