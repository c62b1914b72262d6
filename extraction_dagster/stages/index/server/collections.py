"""The server's collections: which one a name stands for, what it holds, and changing that.

A server follows aliases almost everywhere: `collection_exists` and `get_collection` do, the list of collections has
none, and the list of aliases hides those whose collection the key may not see. So a collection is there when the list
of collections says so, and by nothing else.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from extraction_dagster.errors.index import (
    CollectionInUseError,
    CollectionMissingError,
    CollectionNameTakenError,
    CollectionRightsError,
    CollectionUnfitError,
    CollectionUnnamedError,
    PointStoreError,
    StoreRefusedError,
)
from extraction_dagster.stages.index.protocol import PAYLOAD_INDEXES, CollectionSpec
from extraction_dagster.stages.index.server.limits import ServerLimits
from extraction_dagster.stages.index.server.retry import is_already_there, require_completed

if TYPE_CHECKING:
    from collections.abc import Callable

    from qdrant_client import QdrantClient

_Result = TypeVar("_Result")
_METADATA_KEY = "extraction"
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
_LOOKS = 5
_OTHERS = 3
_log = logging.getLogger(__name__)


class _Call(Protocol):
    """Make a call to the server, and repeat it while its failure is temporary."""

    def __call__(self, operation: str, function: Callable[[], _Result], /) -> _Result: ...


@dataclass(frozen=True, slots=True)
class ServerCollections:
    """Collections and aliases of a server; every method can be repeated after any failure.

    Attributes:
        client: Connected.
        where: The address that is asked, for messages.
        call: Makes and repeats calls.
        timeout: Sent with each request that takes one: a server gives up after 60 s otherwise.
    """

    client: QdrantClient
    where: str
    call: _Call
    timeout: int

    def behind(self, name: str) -> str | None:
        """The collection that a name stands for: an alias' target, or a collection with exactly that name.

        Raises:
            CollectionRightsError: The name is an alias, and the key may not see its collection.
        """
        for _ in range(_LOOKS):  # somebody may make the alias between two looks
            target, there = self._aliases().get(name), self.listed()
            for found in (target, name):
                if found in there:
                    return found
            if target is None and not self._exists(name):
                return None
        raise CollectionRightsError(name, self.where)

    def listed(self) -> set[str]:
        """The real collections that the key may see, no alias among them."""
        return {item.name for item in self.call("list collections", self.client.get_collections).collections}

    def _aliases(self) -> dict[str, str]:
        aliases = self.call("list aliases", self.client.get_aliases).aliases
        return {alias.alias_name: alias.collection_name for alias in aliases}

    def _exists(self, name: str) -> bool:
        """Whether there is a collection or an alias of this name."""
        return bool(self.call("look up a collection", lambda: self.client.collection_exists(name)))

    def under(self, name: str) -> dict[str, bool]:
        """The fingerprints under a name, and whether each is the one that the name stands for."""
        current, prefix = self.behind(name), f"{name}-"
        names = sorted(item for item in self.listed() if item.startswith(prefix))
        return {item.removeprefix(prefix): item == current for item in names if self._belongs(item, name)}

    def is_under(self, target: str, name: str) -> bool:
        """Whether there is such a collection, and it is one of this name, not of a neighbour's: `name-staging`."""
        return target in self.listed() and self._belongs(target, name)

    def _belongs(self, target: str, name: str) -> bool:
        """Whether a collection that begins with a name is of that name: as it says itself, or else by its pattern."""
        fingerprint = target.removeprefix(f"{name}-")
        try:
            metadata = self._metadata(self.info(target).config)
        except StoreRefusedError:  # a key that is for other collections, or dropped since it was listed
            metadata = {}
        if metadata:
            return bool((metadata.get("name"), metadata.get("fingerprint")) == (name, fingerprint))
        return _FINGERPRINT.fullmatch(fingerprint) is not None

    def info(self, target: str) -> Any:  # noqa: ANN401 - the client's own record
        """What the server says of a collection."""
        return self.call("look up a collection", lambda: self.client.get_collection(target))

    @staticmethod
    def _metadata(config: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
        return dict((config.metadata or {}).get(_METADATA_KEY) or {})

    def spec(self, target: str, name: str, info: Any = None) -> CollectionSpec:  # noqa: ANN401 - as above
        """What a collection says of itself; on a server without metadata its full name carries the fingerprint.

        Raises:
            CollectionUnfitError: Its vectors or its indexes are of another kind than ours.
        """
        info = info or self.info(target)
        self._require_fit(target, info)
        config, metadata = info.config, self._metadata(info.config)
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

    def _require_fit(self, target: str, info: Any) -> None:  # noqa: ANN401 - as above
        vectors: Any = info.config.params.vectors
        got = expected = ""
        if not hasattr(vectors, "size"):
            got = f"vectors named {', '.join(map(repr, sorted(vectors)))}" if vectors else "no vectors"
            expected = "one vector without a name"
        elif vectors.distance.value != "Cosine":
            got, expected = f"distance {vectors.distance.value}", "Cosine"
        elif vectors.multivector_config is not None:
            got, expected = "several vectors in each point", "one"
        elif vectors.datatype is not None and vectors.datatype.value not in {"float16", "float32"}:
            got, expected = f"vectors of {vectors.datatype.value}", "float16 or float32"
        for field, kind in PAYLOAD_INDEXES.items():  # of another kind it answers "nothing found", without an error
            there = (info.payload_schema or {}).get(field)
            if there is not None and there.data_type.value != kind:
                got, expected = f"an index of kind {there.data_type.value} on {field!r}", kind
        if got:
            raise CollectionUnfitError(target, self.where, got=got, expected=expected)

    def holds_points(self, target: str) -> bool:
        """Whether a collection has any point."""
        page, _ = self.call("read points", lambda: self.client.scroll(target, limit=1, with_payload=False))
        return bool(page)

    def unnamed(self, name: str) -> list[str]:
        """The collections with points of a name that stands for none; empty when it stands for one."""
        found = [f"{name}-{fingerprint}" for fingerprint in self.under(name)]
        there = [target for target in found if self.holds_points(target)]
        # A run that began meanwhile made its alias before its first point.
        return there if there and self.behind(name) is None else []

    def require_new(self, name: str) -> None:
        """Refuse to begin an empty collection where points of that name are, or where nothing can be read.

        Raises:
            CollectionUnnamedError: There are points already.
            PointStoreError: Collections are there and none can be read: a server in recovery mode takes new ones.
        """
        if there := self.unnamed(name):
            raise CollectionUnnamedError(name, self.where, there=there)
        unreadable: list[PointStoreError] = []
        for other in sorted(self.listed())[:_OTHERS]:
            try:
                self.holds_points(other)
            except PointStoreError as error:
                if "PERMISSION_DENIED" not in str(error):
                    unreadable.append(error)
            else:
                return
        if unreadable:
            raise unreadable[0]

    def require_right_to_create(self, name: str) -> None:
        """Refuse a key that may not create collections, by removing an alias that nobody has."""
        from qdrant_client import models

        nobodys = models.DeleteAlias(alias_name=f"{name}-no-such-alias")
        remove = models.DeleteAliasOperation(delete_alias=nobodys)

        def ask() -> None:
            self.client.update_collection_aliases([remove], timeout=self.timeout)

        try:
            self.call("change aliases", ask)
        except StoreRefusedError as error:
            if "NOT_FOUND" not in str(error):
                raise

    def note_source(self, target: str, spec: CollectionSpec, source: str) -> CollectionSpec:
        """Keep a source's identity in a collection's metadata; returns what the collection says of itself now.

        A server that keeps no metadata, or a key that may not change it, is warned of: runs go on as before.
        """
        kept = {"v": 1, "name": spec.name, "fingerprint": spec.fingerprint, "source": source}
        try:
            self.call(
                "note a collection's source",
                lambda: self.client.update_collection(target, metadata={_METADATA_KEY: kept}, timeout=self.timeout),
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
    ) -> tuple[CollectionSpec, Any]:
        """Create a collection and its payload indexes where they are missing.

        Returns:
            What it says of itself, and what the server says of it.

        Raises:
            ForeignCollectionError: It is not our own, as `require_own` says.
            CollectionMismatchError: It holds other vectors.
            CollectionUnfitError: Something else made it.
            CollectionRightsError: It is an alias, or one that the key may not see.
        """
        if target not in self.listed():
            self._create(target, spec)
            if target not in self.listed():  # "already there" is said of an alias as well
                raise CollectionRightsError(target, self.where)
        info = self.info(target)
        found = self.spec(target, spec.name, info)
        require_own(found)
        spec.require_same_vectors(found, self.where)
        for field, kind in PAYLOAD_INDEXES.items():
            if field not in (info.payload_schema or {}):
                self._create_index(target, field, kind, timeout=ServerLimits.of(info.config).at_most(self.timeout))
        return found, info

    def publish(self, name: str, target: str, current: str | None) -> None:
        """Let a name stand for a collection: one step on the server, which moves an alias that is there.

        Args:
            name: The alias.
            target: The collection.
            current: What the name stands for now.

        Raises:
            CollectionNameTakenError: A collection has that very name, so that it can't become an alias.
        """
        from qdrant_client import models

        if current == target:
            return
        if current == name:
            raise CollectionNameTakenError(name, self.where)
        create = models.CreateAlias(collection_name=target, alias_name=name)
        operation = models.CreateAliasOperation(create_alias=create)
        self.call(
            "publish a collection",
            lambda: self.client.update_collection_aliases([operation], timeout=self.timeout),
        )

    def drop(self, name: str, target: str, require_own: Callable[[CollectionSpec], None]) -> None:
        """Remove a collection, never an alias, and none that an alias stands for: the alias would go with it.

        Raises:
            CollectionInUseError: An alias stands for it.
            CollectionMissingError: There is none.
            ForeignCollectionError: It is not our own, as `require_own` says.
            StoreRefusedError: The server did not remove it.
        """
        if self.behind(name) == target:
            raise CollectionInUseError(target, self.where)
        if not self.is_under(target, name):
            raise CollectionMissingError(target, self.where)
        if target in self._aliases().values():
            raise CollectionInUseError(target, self.where)
        require_own(self.spec(target, name))
        operation = "drop a collection"
        removed = self.call(operation, lambda: self.client.delete_collection(target, timeout=self.timeout))
        if not removed and target in self.listed():  # False also for one that an earlier try removed
            raise StoreRefusedError(operation, self.where, "it answered that nothing was removed")

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
                self.client.create_collection(
                    target, vectors_config=vectors, metadata={_METADATA_KEY: metadata}, timeout=self.timeout
                )
            except Exception as error:
                # Another run created it meanwhile, or an earlier try of ours whose answer was lost.
                if not is_already_there(error):
                    raise

        self.call("create a collection", create)

    def _create_index(self, target: str, field: str, kind: str, *, timeout: int) -> None:
        from qdrant_client import models

        schema = models.PayloadSchemaType(kind)

        def create() -> models.UpdateResult:
            return self.client.create_payload_index(target, field, field_schema=schema, wait=True, timeout=timeout)

        self.call("create a payload index", lambda: require_completed(create))
