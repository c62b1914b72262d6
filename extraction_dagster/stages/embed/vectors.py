"""Checking and normalising what a network gives: the same for frames and for queries."""

from __future__ import annotations

import numpy as np

_SHORTEST = 1e-12
# float16 moves the length of a vector by about 0.0005.
_LENGTH_TOLERANCE = 0.01


def normalise(raw: np.ndarray) -> tuple[np.ndarray, list[str | None]]:
    """Scale each vector to length 1.

    The length is taken in float64, so that no finite float32 vector overflows.

    Args:
        raw: float32, shape (N, dim).

    Returns:
        float32 (N, dim), zeros in the rows that can't be kept; and for each row what is wrong with it, or None.
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", raw, raw, dtype=np.float64))
    finite = np.isfinite(raw).all(axis=1)
    good = finite & (lengths > _SHORTEST)
    unit = np.divide(raw, lengths[:, None], out=np.zeros(raw.shape, np.float64), where=good[:, None])
    return unit.astype(np.float32), [
        None if fine else _fault(row) for fine, row in zip(good.tolist(), raw, strict=True)
    ]


def _fault(row: np.ndarray) -> str:
    if bool(np.isnan(row).any()):
        return "NaN"
    return "an infinite value" if bool(np.isinf(row).any()) else "length zero"


def count_unnormalised(vectors: np.ndarray) -> int:
    """The number of stored vectors, float16 (N, dim), whose length is not 1 up to float16's rounding."""
    wide = vectors.astype(np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    return int(np.count_nonzero(~(np.abs(lengths - 1.0) <= _LENGTH_TOLERANCE)))
