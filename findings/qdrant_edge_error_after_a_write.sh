#!/usr/bin/env bash
# qdrant-edge-py 0.9.0: set_payload and update_vectors over several ids raise for one that is not there, and have written
# the others.
#
# Expected: an update that raises changed nothing, or one over ids that are partly unknown leaves those out, as
#           delete_points does.
# Seen:     "No point with id 99" is raised, and every other point that was named, before it and after it, has its new
#           payload and vector, at once and after the shard was loaded again.
# So:       an error does not say that the old data is still there: whoever catches it reads what is stored before anything
#           is taken for old or new.
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


def stored():
    return {point.id: (point.vector, point.payload) for point in shard.retrieve([1, 2], True, True)}


def refused(operation):
    try:
        shard.update(operation)
    except Exception as error:
        return str(error)
    return ""


os.mkdir(sys.argv[1])
vectors = edge.EdgeVectorParams(size=2, distance=edge.Distance.Cosine)
shard = edge.EdgeShard.create(sys.argv[1], edge.EdgeConfig(vectors=vectors))
shard.update(edge.UpdateOperation.upsert_points([edge.Point(id, [1.0, 0.0], {"old": 1}) for id in (1, 2)]))
shard.update(edge.UpdateOperation.delete_points([99]))  # no error
said = [
    refused(edge.UpdateOperation.set_payload([1, 99, 2], {"new": 1})),
    refused(edge.UpdateOperation.update_vectors([edge.PointVectors(id, [0.0, 1.0]) for id in (1, 99, 2)])),
]
at_once = stored()
shard.flush()
shard.close()
shard = edge.EdgeShard.load(sys.argv[1])
seen = stored()
shard.close()
print(f"raised: {said}; stored: {at_once}; after loading again: {seen}")
assert said == ["No point with id 99"] * 2, "qdrant-edge-py behaves otherwise now"
new = ([0, 1], {"old": 1, "new": 1})
assert at_once == seen == {1: new, 2: new}, "qdrant-edge-py behaves otherwise now"
PYTHON
