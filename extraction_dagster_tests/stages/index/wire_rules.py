"""What a real Qdrant server does and the client's local engine does not, for the wire stand-in.

Each rule behaves as server 1.18.3 was seen to on 2026-11-30 (one node, three peers), unless it says otherwise. None
holds unless a test sets it. The rules stand between the wire and the engine, as an interceptor.
"""

import threading
import time
from dataclasses import dataclass, field

import grpc
from qdrant_client import grpc as q  # noqa: TID253 - a server of its own

VERSION = "1.18.3"
INVALID, DENIED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED
WRITES = {"Upsert", "Delete", "CreateFieldIndex", "Create", "Update", "DeleteCollection", "UpdateAliases"}
_POINT_WRITES = {"Upsert", "Delete", "CreateFieldIndex"}
_READS = {"Count", "Facet", "Query", "Scroll", "Get"}
_TAKES_TIMEOUT = WRITES | {"Count", "Facet", "Query", "Scroll"}
_NO_MEMORY = (
    "Service internal error: 1 of 1 read operations failed: Service internal error: Qdrant was killed during "
    "initialization. Most likely it's Out-of-Memory."
)
_NO_ROOM = "Service internal error: No space left on device: WAL buffer size exceeds available disk space"


class RefusedError(Exception):
    """A call is answered with this status."""

    def __init__(self, code, said, retry_after=None):
        super().__init__(said)
        self.code, self.said, self.retry_after = code, said, retry_after


@dataclass
class Rules(grpc.ServerInterceptor):
    """The rules, each of which a test may set.

    Attributes:
        strict: Strict mode of each collection: fields of StrictModeConfig.
        minute_seconds: How long the minute of a rate limit takes.
        read_only: Keys that may only read.
        names: By key, the names that it may see: collections and aliases alike.
        in_recovery: Reads fail, creating works.
        disk_is_full: Writes fail, deletes too; reads go on.
        statuses: Update statuses by number, for the next writes; the client has no name for 3 and 99.
        status: Of every collection: green, yellow, grey (after a restart), red.
        timeouts: What each request that takes a timeout asked for.
    """

    owner: object
    strict: dict = field(default_factory=dict)
    minute_seconds: float = 60.0
    read_only: set = field(default_factory=set)
    names: dict = field(default_factory=dict)
    in_recovery: bool = False
    disk_is_full: bool = False
    statuses: list = field(default_factory=list)
    status: str = "green"
    timeouts: list = field(default_factory=list)
    _buckets: dict = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def intercept_service(self, continuation, details):
        handler = continuation(details)
        service, _, method = details.method.rpartition("/")
        method = "DeleteCollection" if (service, method) == ("/qdrant.Collections", "Delete") else method
        if handler is None or handler.unary_unary is None:
            return handler

        def answer(request, context):
            try:
                self._before(method, request, self._key(context))
                return self._after(method, request, handler.unary_unary(request, context), self._key(context))
            except RefusedError as refused:
                if refused.retry_after is not None:
                    context.set_trailing_metadata((("retry-after", str(refused.retry_after)),))
                return context.abort(refused.code, refused.said)

        return grpc.unary_unary_rpc_method_handler(
            answer, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )

    @staticmethod
    def _key(context):
        return next((value for key, value in context.invocation_metadata() if key == "api-key"), None)

    def _sees(self, key, name):
        return key not in self.names or name in self.names[key]

    def _before(self, method, request, key):
        name = getattr(request, "collection_name", "")
        if name and not self._sees(key, name):
            raise RefusedError(DENIED, f"Forbidden: Access to collection {name} is required")
        if method in WRITES and key in self.read_only:
            raise RefusedError(DENIED, "Forbidden: Global write access is required")
        if method == "Create" and name in self.owner.engine._client.aliases:
            raise RefusedError(grpc.StatusCode.ALREADY_EXISTS, f"Wrong input: Alias {name} already exists")
        if self.in_recovery and method in _READS | _POINT_WRITES:
            raise RefusedError(grpc.StatusCode.INTERNAL, _NO_MEMORY)
        if self.disk_is_full and method in _POINT_WRITES:
            raise RefusedError(grpc.StatusCode.INTERNAL, _NO_ROOM)
        if method in _TAKES_TIMEOUT:
            self.timeouts.append((method, request.timeout))
        limits = self.strict.get(self.owner.real_name(name), {})
        self._keep_limits(method, request, limits)
        self._fill_bucket(method, request, limits, name)

    @staticmethod
    def _keep_limits(method, request, limits):
        def check(asked, limit, called):
            if limit is not None and asked > limit:
                raise RefusedError(INVALID, f'Bad request: Limit exceeded {asked} > {limit} for "{called}"')

        if method in _POINT_WRITES | _READS - {"Get"}:
            check(request.timeout, limits.get("max_timeout"), "timeout")
        if method == "Upsert":
            check(len(request.points), limits.get("upsert_max_batchsize"), "upsert limit")
        if method in {"Scroll", "Query", "Facet"}:
            check(request.limit, limits.get("max_query_limit"), "limit")
        if method == "Count" and request.exact and limits.get("search_allow_exact") is False:
            raise RefusedError(INVALID, "Bad request: Exact search disabled! Help: Set exact=false.")
        conditions = list(_conditions(_filter_of(method, request)))
        check(len(conditions), limits.get("filter_max_conditions"), "filter limit")
        check(max(map(_size, conditions), default=0), limits.get("condition_max_size"), "condition limit")

    def _fill_bucket(self, method, request, limits, name):
        """A token a point; tokens come back evenly over a minute."""
        limit = limits.get("write_rate_limit")
        if limit is None or method not in _POINT_WRITES:
            return
        cost = len(request.points) if method == "Upsert" else 1
        if cost > limit:
            said = "Rate limiting exceeded: request larger than rate limiter capacity, please try to split your request"
            raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, said)
        with self._lock:
            now = time.monotonic()
            tokens, since = self._buckets.get(name, (limit, now))
            tokens = min(limit, tokens + (now - since) * limit / self.minute_seconds)
            if cost > tokens:
                self._buckets[name] = (tokens, now)
                said = "Rate limiting exceeded: Write rate limit exceeded, retry later"
                raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, said, retry_after=1)
            self._buckets[name] = (tokens - cost, now)

    def _after(self, method, request, answer, key):
        if method in _POINT_WRITES and self.statuses:
            answer.result.status = self.statuses.pop(0)
        elif method == "Get":
            limits = self.strict.get(self.owner.real_name(request.collection_name))
            if limits is not None:
                config = q.StrictModeConfig(enabled=True, **limits)
                answer.result.config.strict_mode_config.CopyFrom(config)
            answer.result.status = q.CollectionStatus.Value(self.status.title())
        elif method == "List":
            shown = [item for item in answer.collections if self._sees(key, item.name)]
            return q.ListCollectionsResponse(collections=shown)
        elif method == "ListAliases":
            shown = [
                item
                for item in answer.aliases
                if self._sees(key, item.alias_name) and self._sees(key, item.collection_name)
            ]
            return q.ListAliasesResponse(aliases=shown)
        elif method in {"Count", "Scroll", "Facet"} and self._index_is_of_another_kind(method, request):
            return type(answer)()  # nothing found, and no error
        return answer

    def _index_is_of_another_kind(self, method, request):
        kind = self.owner.indexes.get(self.owner.real_name(request.collection_name), {}).get("record_id")
        asked = {condition.field.key for condition in _conditions(_filter_of(method, request))}
        return kind not in {None, q.PayloadSchemaType.Integer} and "record_id" in asked

    def update_aliases(self, request):
        """Each action is kept before the next is looked at; called with the engine's lock."""
        engine = self.owner.engine._client
        for action in request.actions:
            if action.HasField("delete_alias"):
                engine.aliases.pop(action.delete_alias.alias_name, None)
                continue
            create = action.create_alias
            if create.alias_name in engine.collections:
                raise RefusedError(INVALID, f"Wrong input: Alias {create.alias_name} is the name of a collection")
            if create.collection_name not in engine.collections:
                said = f"Not found: Collection `{create.collection_name}` doesn't exist!"
                raise RefusedError(grpc.StatusCode.NOT_FOUND, said)
            engine.aliases[create.alias_name] = create.collection_name
        return q.CollectionOperationResponse(result=True)


class Root(q.QdrantServicer):
    """The server itself."""

    def HealthCheck(self, request, context):  # noqa: ARG002, N802 - the protocol's
        return q.HealthCheckReply(title="qdrant - vector search engine", version=VERSION)


def cluster_info():
    """Three peers, two shards, two replicas of each, one of which is being copied."""
    return q.CollectionClusterInfoResponse(
        peer_id=1,
        shard_count=2,
        local_shards=[q.LocalShardInfo(shard_id=0, state=q.ReplicaState.Active)],
        remote_shards=[
            q.RemoteShardInfo(shard_id=0, peer_id=2, state=q.ReplicaState.Active),
            q.RemoteShardInfo(shard_id=1, peer_id=2, state=q.ReplicaState.Active),
            q.RemoteShardInfo(shard_id=1, peer_id=3, state=q.ReplicaState.Partial),
        ],
    )


def _filter_of(method, request):
    if method in {"Count", "Query", "Scroll", "Facet"}:
        return request.filter
    return request.points.filter if method == "Delete" else q.Filter()


def _conditions(found):
    for condition in (*found.must, *found.should, *found.must_not):
        if condition.HasField("filter"):
            yield from _conditions(condition.filter)
        else:
            yield condition


def _size(condition):
    return max(len(condition.field.match.integers.integers), len(condition.has_id.has_id))
