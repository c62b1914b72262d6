#!/usr/bin/env bash
# qdrant-edge-py 0.9.0: MatchValue(value=True) finds the points whose payload is the number 1, and none whose is true.
#
# Expected: the signature says Union[str, int, bool], and a payload of true comes back as true and is counted as a bool by
#           a facet; so a match with True finds it, as it does on a server.
# Seen:     True finds only 1, False only 0, with and without an index over bools; the points with true and false are
#           found by no MatchValue at all. Nothing is raised.
# So:       a yes/no field that people filter by is written as a string or as 0 and 1, and filtered by the same.
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

VALUES = [True, False, 1, 0]


def found(shard, value):
    wanted = edge.Filter(must=[edge.FieldCondition("flag", match=edge.MatchValue(value=value))])
    points, _ = shard.scroll(edge.ScrollRequest(filter=wanted, limit=10))
    return [VALUES[point.id] for point in points]


os.mkdir(sys.argv[1])
vectors = edge.EdgeVectorParams(size=2, distance=edge.Distance.Cosine)
shard = edge.EdgeShard.create(sys.argv[1], edge.EdgeConfig(vectors=vectors))
shard.update(
    edge.UpdateOperation.upsert_points(
        [edge.Point(number, [0.6, 0.8], {"flag": value}) for number, value in enumerate(VALUES)]
    )
)
plain = [repr(found(shard, value)) for value in (True, False)]
shard.update(edge.UpdateOperation.create_field_index("flag", edge.PayloadSchemaType.Bool))
indexed = [repr(found(shard, value)) for value in (True, False)]
counted = shard.facet(edge.FacetRequest("flag", exact=True)).hits
print(f"True and False find: {plain}, with an index over bools: {indexed}; its facet: {counted}")
assert plain == indexed == ["[1]", "[0]"] and len(counted) == 2, "qdrant-edge-py behaves otherwise now"
PYTHON
