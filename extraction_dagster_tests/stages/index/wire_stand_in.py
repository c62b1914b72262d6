"""A stand-in for a Qdrant server: real gRPC on loopback over qdrant-client's local engine, with faults on demand.

It is no Qdrant: strict mode, optimisation, replication and persistence are a real server's alone. What it shows is
what our side does with the bytes, the status codes, the lost answers and the cut connections.
"""

import contextlib
import socket
import struct
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from qdrant_client import QdrantClient  # noqa: TID253 - a server of its own
from qdrant_client import grpc as q  # noqa: TID253 - a server of its own
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc  # noqa: TID253 - a server of its own

_CODES = {
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "internal": grpc.StatusCode.INTERNAL,
    "deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
    "aborted": grpc.StatusCode.ABORTED,
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
}


@dataclass(frozen=True)
class Fault:
    """What happens to the next call of a method: a code of `_CODES`, or
    `exhausted` (429 with Retry-After), `lost` (applied, then the answer is lost), `acknowledged` (applied later than
    answered: here, never), `reset` (the connection is cut before it is applied), `reset_after`, `slow`.
    """

    method: str
    kind: str
    seconds: float = 0.0


class StandIn:
    """The server: `with StandIn() as server: … server.url, server.port, server.faults`."""

    def __init__(self):
        self.engine = QdrantClient(":memory:")
        self.lock = threading.Lock()
        self.faults: list[Fault] = []
        self.calls: list[str] = []
        self.num_at_work = 0
        self.keys: set[str] = set()
        self.indexes: dict[str, dict[str, int]] = {}
        self.quantized: set[str] = set()
        self._server = grpc.server(ThreadPoolExecutor(8))
        inner = self._server.add_insecure_port("127.0.0.1:0")
        q.add_PointsServicer_to_server(_Points(self), self._server)
        q.add_CollectionsServicer_to_server(_Collections(self), self._server)
        self._server.start()
        self.relay = _Relay(inner)
        self.port = self.relay.port
        self.url = "http://127.0.0.1:1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.relay.close()
        self._server.stop(None).wait(30)
        self.engine.close()

    def answer(self, method, context, apply, acknowledged=None):
        """Apply a call, or do to it what the next fault for it says."""
        self.calls.append(method)
        with self._working():
            return self._answer(method, context, apply, acknowledged)

    @contextlib.contextmanager
    def _working(self):
        with self.lock:
            self.num_at_work += 1
        try:
            yield
        finally:
            with self.lock:
                self.num_at_work -= 1

    def _answer(self, method, context, apply, acknowledged):
        self.keys |= {value for key, value in context.invocation_metadata() if key == "api-key"}
        fault = next((fault for fault in self.faults if fault.method in (method, "*")), None)
        if fault is None:
            return self._apply(context, apply)
        self.faults.remove(fault)
        return self._fail(fault, context, apply, acknowledged)

    def _fail(self, fault, context, apply, acknowledged):
        if fault.kind == "acknowledged":
            return acknowledged
        if fault.kind == "slow":
            time.sleep(fault.seconds)
            return self._apply(context, apply)
        if fault.kind in ("lost", "reset_after"):
            self._apply(context, apply)
        if fault.kind.startswith("reset"):
            self.relay.reset()
        if fault.kind == "exhausted":
            context.set_trailing_metadata((("retry-after", str(int(fault.seconds))),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests")
        return context.abort(_CODES.get(fault.kind, grpc.StatusCode.UNAVAILABLE), f"fault: {fault.kind}")

    def _apply(self, context, apply):
        with self.lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return apply()
            except ValueError as error:
                code = grpc.StatusCode.ALREADY_EXISTS if "already exists" in str(error) else grpc.StatusCode.NOT_FOUND
                return context.abort(code, str(error))


def _updated(status=q.UpdateStatus.Completed):
    return q.PointsOperationResponse(result=q.UpdateResult(operation_id=1, status=status))


_ACKNOWLEDGED = _updated(q.UpdateStatus.Acknowledged)


def _filter(request):
    return GrpcToRest.convert_filter(request.filter) if request.HasField("filter") else None


class _Points(q.PointsServicer):
    """Facets are not answered: an exact one counts once for each distinct value (1.18.3), so none is asked for."""

    def __init__(self, owner):
        self.owner = owner

    def Upsert(self, request, context):  # noqa: N802 - the protocol's name
        def apply():
            self.owner.engine.upsert(
                request.collection_name, [GrpcToRest.convert_point_struct(point) for point in request.points]
            )
            return _updated() if request.wait else _ACKNOWLEDGED

        return self.owner.answer("Upsert", context, apply, _ACKNOWLEDGED)

    def Delete(self, request, context):  # noqa: N802 - the protocol's name
        def apply():
            selector = GrpcToRest.convert_points_selector(request.points)
            self.owner.engine.delete(request.collection_name, selector)
            return _updated() if request.wait else _ACKNOWLEDGED

        return self.owner.answer("Delete", context, apply, _ACKNOWLEDGED)

    def Count(self, request, context):  # noqa: N802 - the protocol's name
        def apply():
            found = self.owner.engine.count(request.collection_name, _filter(request), exact=request.exact)
            return q.CountResponse(result=q.CountResult(count=found.count))

        return self.owner.answer("Count", context, apply)

    def Query(self, request, context):  # noqa: N802 - the protocol's name
        def apply():
            found = self.owner.engine.query_points(
                request.collection_name,
                query=list(request.query.nearest.dense.data),
                query_filter=_filter(request),
                limit=request.limit,
            ).points
            if request.collection_name in self.owner.quantized and not request.params.quantization.rescore:
                for point in found:  # an int8 estimate: 0.998 to 1.003 for a vector and itself (1.18.3)
                    point.score *= 0.998
            least = request.score_threshold if request.HasField("score_threshold") else float("-inf")
            return q.QueryResponse(
                result=[RestToGrpc.convert_scored_point(point) for point in found if point.score > least]
            )

        return self.owner.answer("Query", context, apply)

    def Scroll(self, request, context):  # noqa: N802 - the protocol's name
        def apply():
            records, offset = self.owner.engine.scroll(
                request.collection_name,
                _filter(request),
                limit=request.limit,
                offset=GrpcToRest.convert_point_id(request.offset) if request.HasField("offset") else None,
                with_payload=GrpcToRest.convert_with_payload_selector(request.with_payload),
                with_vectors=request.with_vectors.enable,
            )
            for record in records:
                record.payload = record.payload or {}
            next_page = RestToGrpc.convert_extended_point_id(offset) if offset is not None else None
            return q.ScrollResponse(
                result=[RestToGrpc.convert_retrieved_point(record) for record in records], next_page_offset=next_page
            )

        return self.owner.answer("Scroll", context, apply)

    def CreateFieldIndex(self, request, context):  # noqa: N802 - the protocol's name
        def apply():
            kinds = {
                q.FieldType.FieldTypeKeyword: q.PayloadSchemaType.Keyword,
                q.FieldType.FieldTypeInteger: q.PayloadSchemaType.Integer,
                q.FieldType.FieldTypeDatetime: q.PayloadSchemaType.Datetime,
            }
            fields = self.owner.indexes.setdefault(request.collection_name, {})
            fields[request.field_name] = kinds[request.field_type]
            return _updated() if request.wait else _ACKNOWLEDGED

        return self.owner.answer("CreateFieldIndex", context, apply, _ACKNOWLEDGED)


class _Collections(q.CollectionsServicer):
    def __init__(self, owner):
        self.owner = owner

    def CollectionExists(self, request, context):  # noqa: N802 - the protocol's name
        def apply():
            exists = self.owner.engine.collection_exists(request.collection_name)
            return q.CollectionExistsResponse(result=q.CollectionExists(exists=exists))

        return self.owner.answer("CollectionExists", context, apply)

    def Create(self, request, context):  # noqa: N802 - the protocol's name
        def apply():
            self.owner.engine.create_collection(
                request.collection_name,
                GrpcToRest.convert_vectors_config(request.vectors_config),
                metadata=GrpcToRest.convert_payload(request.metadata),
            )
            if request.vectors_config.params.HasField("quantization_config"):
                self.owner.quantized.add(request.collection_name)
            return q.CollectionOperationResponse(result=True)

        return self.owner.answer("Create", context, apply)

    def Update(self, request, context):  # noqa: N802 - the protocol's name
        def apply():
            metadata = GrpcToRest.convert_payload(request.metadata)
            done = self.owner.engine.update_collection(request.collection_name, metadata=metadata)
            return q.CollectionOperationResponse(result=done)

        return self.owner.answer("Update", context, apply)

    def Delete(self, request, context):  # noqa: N802 - the protocol's name
        def apply():
            return q.CollectionOperationResponse(result=self.owner.engine.delete_collection(request.collection_name))

        return self.owner.answer("DeleteCollection", context, apply)

    def Get(self, request, context):  # noqa: N802 - the protocol's name
        def apply():
            info = RestToGrpc.convert_collection_info(self.owner.engine.get_collection(request.collection_name))
            for field, kind in self.owner.indexes.get(request.collection_name, {}).items():
                info.payload_schema[field].data_type = kind
            return q.GetCollectionInfoResponse(result=info)

        return self.owner.answer("Get", context, apply)

    def List(self, request, context):  # noqa: ARG002, N802 - the protocol's signature
        def apply():
            found = self.owner.engine.get_collections().collections
            return q.ListCollectionsResponse(
                collections=[RestToGrpc.convert_collection_description(item) for item in found]
            )

        return self.owner.answer("List", context, apply)

    def ListAliases(self, request, context):  # noqa: ARG002, N802 - the protocol's signature
        def apply():
            aliases = self.owner.engine.get_aliases().aliases
            return q.ListAliasesResponse(aliases=[RestToGrpc.convert_alias_description(item) for item in aliases])

        return self.owner.answer("ListAliases", context, apply)

    def UpdateAliases(self, request, context):  # noqa: N802 - the protocol's name
        def apply():
            operations = [GrpcToRest.convert_alias_operations(action) for action in request.actions]
            for operation in operations:
                # A server refuses this; the local engine does not notice.
                create = getattr(operation, "create_alias", None)
                if create is not None and self.owner.engine.collection_exists(create.alias_name):
                    existing = {item.name for item in self.owner.engine.get_collections().collections}
                    if create.alias_name in existing:
                        message = f"collection {create.alias_name} already exists"
                        raise ValueError(message)
            return q.CollectionOperationResponse(result=self.owner.engine.update_collection_aliases(operations))

        return self.owner.answer("UpdateAliases", context, apply)


class _Relay:
    """Passes bytes to the gRPC port, so that a connection can be cut with a TCP reset."""

    def __init__(self, target):
        self._target = target
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                outer, _ = self._listener.accept()
                inner = socket.create_connection(("127.0.0.1", self._target))
                self._pairs.append((outer, inner))
                threading.Thread(target=self._copy, args=(outer, inner), daemon=True).start()
                threading.Thread(target=self._copy, args=(inner, outer), daemon=True).start()

    @staticmethod
    def _copy(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def reset(self):
        for outer, inner in self._pairs:
            with contextlib.suppress(OSError):
                # Linger of zero seconds turns close into a reset.
                outer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            for end in (outer, inner):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        self._pairs.clear()

    def close(self):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()
