"""Points as gRPC messages, made with as little of the client's CPU as can be."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from qdrant_client import QdrantClient, models

    from extraction_dagster.stages.index.points import PointBatch

Wire = Literal["grpc", "local"]


def prepare_upsert(
    client: QdrantClient, target: str, batch: PointBatch, *, wire: Wire, timeout_seconds: int
) -> Callable[[], models.UpdateResult]:
    """A call that writes the batch and waits until it is applied; it can be repeated without encoding again."""
    if wire == "local":
        from qdrant_client import models

        points = [
            models.PointStruct(id=point_id, vector=vector, payload=dict(payload))
            for point_id, vector, payload in zip(batch.ids, batch.vectors.tolist(), batch.payloads, strict=True)
        ]
        return lambda: client.upsert(target, points, wait=True)
    from qdrant_client.conversions.conversion import GrpcToRest

    request = _grpc_request(target, batch)
    request.timeout = timeout_seconds
    return lambda: GrpcToRest.convert_update_result(client.grpc_points.Upsert(request, timeout=timeout_seconds).result)


def _grpc_request(target: str, batch: PointBatch) -> Any:  # noqa: ANN401 - a generated class
    """The points as one gRPC message.

    They are made in their place, which saves a copy, and out of bytes: those of a vector go in as they are, those of
    a payload's entry are made once for all points that share it. A third of what Python floats and values cost.
    """
    from qdrant_client import grpc

    request = grpc.UpsertPoints(collection_name=target, wait=True)
    prefix = _vector_prefix(batch.dim)
    rows = np.ascontiguousarray(batch.vectors, dtype="<f4")
    for point_id, row, payload in zip(batch.ids, rows, batch.payloads, strict=True):
        point = request.points.add()
        point.id.uuid = point_id
        point.MergeFromString(b"".join([_entry(key, value) for key, value in payload.items()]))
        point.vectors.vector.dense.MergeFromString(prefix + row.tobytes())
    return request


def _entry(key: str, value: object) -> bytes:
    """An entry of a point's payload, serialized."""
    try:
        return _known_entry(key, value)
    except TypeError:  # a list or an object can't be looked up
        return _known_entry.__wrapped__(key, value)


@functools.lru_cache(maxsize=4096, typed=True)  # typed: 1, 1.0 and true are equal, and not the same in JSON
def _known_entry(key: str, value: object) -> bytes:
    from qdrant_client import grpc
    from qdrant_client.conversions.conversion import json_to_value

    return bytes(grpc.PointStruct(payload={key: json_to_value(value)}).SerializeToString())


@functools.cache
def _vector_prefix(dim: int) -> bytes:
    """What stands before the floats in a serialized vector of this length."""
    from qdrant_client import grpc

    message = grpc.DenseVector(data=[0.0] * dim)
    return bytes(message.SerializeToString()[: -4 * dim])
