#!/usr/bin/env bash
# qdrant-edge-py 0.9.0: "any value except these" leaves out different points once the field has an index.
#
# Expected: MatchExcept finds the points whose value is not among those named, with an index as without one.
# Seen:     without an index it finds every point that has a value; once there is one over keywords those with a number
#           vanish, with one over integers those with a text. Points without a value are found by neither.
# So:       "not these" is asked as must_not with MatchAny, which finds the same points whatever the index is.
#
# Run it: it installs the package into a temporary folder, prints what it saw, and fails when that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet qdrant-edge-py==0.9.0
"$folder/venv/bin/python" - "$folder/shard" <<'PYTHON'
import os
import sys

import qdrant_edge as edge

VALUES = [1, 2, "a", "b", [], None]


def found(shard, **conditions):
    points, _ = shard.scroll(edge.ScrollRequest(filter=edge.Filter(**conditions), limit=10))
    return [VALUES[point.id] for point in points]


def looked(shard):
    condition = edge.FieldCondition("field", match=edge.MatchExcept(["x"]))
    opposite = edge.FieldCondition("field", match=edge.MatchAny(["x"]))
    numbers = edge.FieldCondition("field", match=edge.MatchExcept([9]))
    return found(shard, must=[condition]), found(shard, must=[numbers]), found(shard, must_not=[opposite])


os.mkdir(sys.argv[1])
vectors = edge.EdgeVectorParams(size=2, distance=edge.Distance.Cosine)
shard = edge.EdgeShard.create(sys.argv[1], edge.EdgeConfig(vectors=vectors))
shard.update(
    edge.UpdateOperation.upsert_points(
        [edge.Point(number, [0.6, 0.8], {"field": value}) for number, value in enumerate(VALUES)]
    )
)
seen = {"none": looked(shard)}
for kind in ("Keyword", "Integer"):
    shard.update(edge.UpdateOperation.create_field_index("field", getattr(edge.PayloadSchemaType, kind)))
    seen[kind] = looked(shard)
for kind, (texts, numbers, opposite) in seen.items():
    print(f"index {kind}: except 'x' {texts}, except 9 {numbers}, must_not any of 'x' {opposite}")
assert {kind: answers[:2] for kind, answers in seen.items()} == {
    "none": ([1, 2, "a", "b"], [1, 2, "a", "b"]),
    "Keyword": (["a", "b"], [1, 2, "a", "b"]),
    "Integer": ([1, 2, "a", "b"], [1, 2]),
}, "qdrant-edge-py behaves otherwise now"
assert all(answers[2] == VALUES for answers in seen.values()), "qdrant-edge-py behaves otherwise now"
PYTHON
