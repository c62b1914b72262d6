"""Points in the shapes that a server, or the client's own local engine, takes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from extraction_dagster.stages.index.filters import Dialect

if TYPE_CHECKING:
    from collections.abc import Callable

    from qdrant_client import QdrantClient, models

    from extraction_dagster.stages.index.points import PointBatch

Wire = Literal["grpc", "local"]


def prepare_upsert(
    client: QdrantClient, target: str, batch: PointBatch, *, wire: Wire, timeout_seconds: float
) -> Callable[[], models.UpdateResult]:
    """A call that writes the batch and waits until it is applied; it can be repeated without encoding again."""
    if wire == "local":
        points = _model_points(batch)
        return lambda: client.upsert(target, points, wait=True)
    from qdrant_client import grpc
    from qdrant_client.conversions.conversion import GrpcToRest

    request = grpc.UpsertPoints(collection_name=target, points=_grpc_points(batch), wait=True)
    return lambda: GrpcToRest.convert_update_result(client.grpc_points.Upsert(request, timeout=timeout_seconds).result)


def _grpc_points(batch: PointBatch) -> list[Any]:
    """Points as gRPC messages.

    A vector's bytes go into its message as they are, which costs a third of handing over Python floats.
    """
    from qdrant_client import grpc
    from qdrant_client.conversions.conversion import payload_to_grpc

    prefix = _vector_prefix(batch.dim)
    rows = np.ascontiguousarray(batch.vectors, dtype="<f4")
    points = []
    for point_id, row, payload in zip(batch.ids, rows, batch.payloads, strict=True):
        point = grpc.PointStruct(id=grpc.PointId(uuid=point_id), payload=payload_to_grpc(dict(payload)))
        point.vectors.vector.dense.MergeFromString(prefix + row.tobytes())
        points.append(point)
    return points


@functools.cache
def _vector_prefix(dim: int) -> bytes:
    """What stands before the floats in a serialized vector of this length."""
    from qdrant_client import grpc

    message = grpc.DenseVector(data=[0.0] * dim)
    return bytes(message.SerializeToString()[: -4 * dim])


def _model_points(batch: PointBatch) -> list[Any]:
    from qdrant_client import models

    return [
        models.PointStruct(id=point_id, vector=vector, payload=dict(payload))
        for point_id, vector, payload in zip(batch.ids, batch.vectors.tolist(), batch.payloads, strict=True)
    ]


@functools.cache
def dialect() -> Dialect:
    """The client's classes for filters."""
    from qdrant_client import models

    return Dialect(
        filter=models.Filter,
        field=models.FieldCondition,
        match_any=models.MatchAny,
        match_value=models.MatchValue,
        number_range=models.Range,
        datetime_range=models.DatetimeRange,
        has_ids=lambda ids: models.HasIdCondition(has_id=list(ids)),
    )
