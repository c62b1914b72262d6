#!/usr/bin/env bash
# qdrant-edge-py 0.9.0: an index over UUIDs makes an exact match find other spellings of the value.
#
# Expected: MatchValue is exact: it finds the payload that is written as the value is.
# Seen:     without an index a UUID in small letters finds that spelling alone; with an index over UUIDs it finds it in
#           capitals and without dashes as well, while the payloads come back as they were written.
# So:       UUIDs are written in one spelling, or a file name and its capitals are taken for one as soon as somebody adds
#           the index.
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

SMALL = "0f8fad5b-d9cb-469f-a165-70867728950e"
SPELLINGS = [SMALL, SMALL.upper(), SMALL.replace("-", "")]


def found(shard):
    wanted = edge.Filter(must=[edge.FieldCondition("code", match=edge.MatchValue(value=SMALL))])
    points, _ = shard.scroll(edge.ScrollRequest(filter=wanted, limit=10, with_payload=True))
    return [point.payload["code"] for point in points]


os.mkdir(sys.argv[1])
vectors = edge.EdgeVectorParams(size=2, distance=edge.Distance.Cosine)
shard = edge.EdgeShard.create(sys.argv[1], edge.EdgeConfig(vectors=vectors))
shard.update(
    edge.UpdateOperation.upsert_points(
        [edge.Point(number, [0.6, 0.8], {"code": code}) for number, code in enumerate(SPELLINGS)]
    )
)
plain = found(shard)
shard.update(edge.UpdateOperation.create_field_index("code", edge.PayloadSchemaType.Uuid))
indexed = found(shard)
print(f"without an index: {plain}; with an index over UUIDs: {indexed}")
assert (plain, indexed) == ([SMALL], SPELLINGS), "qdrant-edge-py behaves otherwise now"
PYTHON
