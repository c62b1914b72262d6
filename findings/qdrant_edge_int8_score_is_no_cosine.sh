#!/usr/bin/env bash
# qdrant-edge-py 0.9.0: with int8 quantization a vector's cosine with itself is anything from 0.98 to 1.02, and the
# threshold cuts by that.
#
# Expected: quantization chooses the candidates; scores of vectors that are stored in full are cosines, at most 1.
# Seen:     of 300 vectors of 64 dimensions, each asked for by itself, the best score is above 1 for many and below 0.9999
#           for many; with score_threshold=0.9999 those are not found at all. With rescore=True all are 1 and found.
# So:       whoever compares scores with a threshold, or shows them as cosines, asks for rescoring.
#
# Run it: it installs the package into a temporary folder, prints what it saw, and fails when that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet qdrant-edge-py==0.9.0 numpy==2.3.5
"$folder/venv/bin/python" - "$folder/shard" <<'PYTHON'
import os
import sys

import numpy as np
import qdrant_edge as edge

os.mkdir(sys.argv[1])
rng = np.random.default_rng(0)
vectors = rng.standard_normal((300, 64))
vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).tolist()
config = edge.EdgeConfig(
    vectors=edge.EdgeVectorParams(
        size=64,
        distance=edge.Distance.Cosine,
        quantization_config=edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8),
    ),
    optimizers=edge.EdgeOptimizersConfig(indexing_threshold=1),
)
shard = edge.EdgeShard.create(sys.argv[1], config)
shard.update(edge.UpdateOperation.upsert_points([edge.Point(n, vector, {}) for n, vector in enumerate(vectors)]))
shard.optimize()


def best(rescore, threshold=None):
    quantization = edge.QuantizationSearchParams(rescore=rescore)
    scores = []
    for vector in vectors:
        request = edge.QueryRequest(
            limit=1,
            query=edge.Query.Nearest(vector),
            score_threshold=threshold,
            params=edge.SearchParams(quantization=quantization),
        )
        scores += [hit.score for hit in shard.query(request)]
    return scores


estimated, rescored = best(None), best(True)
kept, kept_rescored = len(best(None, 0.9999)), len(best(True, 0.9999))
print(f"scores {min(estimated):.4f} to {max(estimated):.4f}, {kept} of 300 reach 0.9999")
print(f"rescored {min(rescored):.6f} to {max(rescored):.6f}, {kept_rescored} of 300 reach 0.9999")
assert max(estimated) > 1.001 and min(estimated) < 0.999 and kept < 250, "qdrant-edge-py behaves otherwise now"
assert abs(max(rescored) - 1) < 1e-5 and abs(min(rescored) - 1) < 1e-5, "qdrant-edge-py behaves otherwise now"
assert kept_rescored == 300, "qdrant-edge-py behaves otherwise now"
PYTHON
