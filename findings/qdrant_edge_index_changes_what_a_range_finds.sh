#!/usr/bin/env bash
# qdrant-edge-py 0.9.0: an index over integers does not only make a range faster; other points are found by it.
#
# Expected: an index changes what a filter costs, not what it finds.
# Seen:     with an integer index 7.5 is no more between 7 and 8; of 2**53+3, +4 and +5 the range "from 2**53+3" loses the
#           first (bounds are floats, rounded up here; without the index the values are rounded too); and a range of
#           date-times finds integers, which it takes for microseconds since 1970, and loses the date-times.
# So:       one index for each field, of the type that every payload has; ids above 2**53 are matched, not ranged; and a
#           test of a filter runs with the index that production has.
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

VALUES = [7, 7.5, 2**53 + 3, 2**53 + 4, 2**53 + 5, "2026-01-01T00:00:00Z"]
RANGES = {
    "7 to 8": edge.RangeFloat(gte=7, lte=8),
    "from 2**53+3": edge.RangeFloat(gte=2**53 + 3),
    "since 2025": edge.RangeDateTime(gte="2025-01-01T00:00:00Z"),
}


def found(shard):
    seen = {}
    for name, wanted in RANGES.items():
        condition = edge.Filter(must=[edge.FieldCondition("field", range=wanted)])
        points, _ = shard.scroll(edge.ScrollRequest(filter=condition, limit=10))
        seen[name] = [VALUES[point.id] for point in points]
    return seen


os.mkdir(sys.argv[1])
vectors = edge.EdgeVectorParams(size=2, distance=edge.Distance.Cosine)
shard = edge.EdgeShard.create(sys.argv[1], edge.EdgeConfig(vectors=vectors))
shard.update(
    edge.UpdateOperation.upsert_points(
        [edge.Point(number, [0.6, 0.8], {"field": value}) for number, value in enumerate(VALUES)]
    )
)
plain = found(shard)
shard.update(edge.UpdateOperation.create_field_index("field", edge.PayloadSchemaType.Integer))
indexed = found(shard)
for name in RANGES:
    print(f"{name}: {plain[name]} without an index, {indexed[name]} with one over integers")
big = VALUES[2:5]
assert plain == {"7 to 8": [7, 7.5], "from 2**53+3": big, "since 2025": VALUES[5:]}, "qdrant-edge-py behaves otherwise now"
assert indexed == {"7 to 8": [7], "from 2**53+3": big[1:], "since 2025": big}, "qdrant-edge-py behaves otherwise now"
PYTHON
