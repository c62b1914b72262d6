"""How well vectors find what shows the same: P@1 and mAP, image to image, beside a colour histogram.

    python benchmarks/retrieval.py [--corpus FOLDER] [--frames 4]

The corpus has a MANIFEST.csv with the columns path, decodes_ok, class and group; EXTRACTION_TEST_CORPUS names it. The
model is that of the settings. Each sampled frame is a query, and answers are frames of other videos:

    same footage    of the same group: transcodes, crops and rotations of it; over all videos
    same content    of the same class; over the videos of other groups, so that near duplicates don't count
    altered copy    of the same group, for a query that was mirrored, cropped, darkened and compressed; over all frames

Classes differ in size, from 8 queries to 32, so each mean is given twice: over queries, and over the classes' own
means, in which every class counts alike.
"""

from __future__ import annotations

import argparse
import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg

from extraction_dagster.errors.embed import QueryVideoError
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.embed.models.registry import load_model
from extraction_dagster.stages.embed.passes import normalise
from extraction_dagster.stages.embed.query import embed_query_video

_BINS = 8


@dataclass(frozen=True)
class Frames:
    """Every sampled frame: its two vectors, those of its altered copy, and where it comes from."""

    model: np.ndarray
    histogram: np.ndarray
    altered_model: np.ndarray
    altered_histogram: np.ndarray
    video: np.ndarray
    group: np.ndarray
    content: np.ndarray


def histogram(image: np.ndarray) -> np.ndarray:
    """Colours in 8x8x8 bins, the square root of each share: products of two are Bhattacharyya's coefficient."""
    bins = (image // (256 // _BINS)).reshape(-1, 3).astype(np.int64)
    counts = np.bincount(bins @ np.array([_BINS * _BINS, _BINS, 1]), minlength=_BINS**3)
    return np.sqrt(counts / counts.sum()).astype(np.float32)


def altered(image: np.ndarray) -> np.ndarray:
    """Mirrored, the middle 7/10 of each side, at 6/10 of its brightness, as a JPEG of quality 30."""
    height, width = image.shape[:2]
    top, left = height * 3 // 20, width * 3 // 20
    middle = image[top : height - top, left : width - left][:, ::-1]
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray((middle * 0.6).astype(np.uint8)), 30, "RGB", "420")
    return simplejpeg.decode_jpeg(jpeg, colorspace="RGB")


def read(corpus: Path, settings: Settings, num_frames: int) -> Frames:
    """Decode and embed the labelled part of the corpus, a few frames a video."""
    with (corpus / "MANIFEST.csv").open(newline="") as file:
        labelled = [row for row in csv.DictReader(file) if row["class"] and row["decodes_ok"] == "yes"]
    model, found = load_model(settings), []
    for number, row in enumerate(labelled):
        try:
            video = embed_query_video(model, corpus / row["path"], settings, max_frames=num_frames)
        except QueryVideoError as error:
            print(f"left out: {error}")
            continue
        images = [simplejpeg.decode_jpeg(jpeg, colorspace="RGB") for jpeg in video.jpegs]
        copies = [altered(image) for image in images]
        columns = (
            video.vectors,
            normalise(np.array([histogram(image) for image in images]))[0],
            normalise(model.embed_images(copies))[0],
            normalise(np.array([histogram(copy) for copy in copies]))[0],
        )
        group = row["group"] or row["path"]
        found += [(*vectors, number, group, row["class"]) for vectors in zip(*columns, strict=True)]
    return Frames(*(np.array(column) for column in zip(*found, strict=True)))


@dataclass(frozen=True)
class Scores:
    """Of each query that has an answer: which one, whether its first hit is right, and its average precision."""

    query: np.ndarray
    first: np.ndarray
    precision: np.ndarray

    def means(self, label: np.ndarray) -> tuple[float, float, float, float]:
        """P@1 and mAP over queries, then over the means of the queries of each label."""
        scores = np.stack([self.first, self.precision])
        labels = label[self.query]
        by_label = np.mean([scores[:, labels == one].mean(1) for one in np.unique(labels)], axis=0)
        return (*scores.mean(1).tolist(), *by_label.tolist())


def score(queries: np.ndarray, vectors: np.ndarray, relevant: np.ndarray, candidate: np.ndarray) -> Scores:
    """Rank the vectors for each query.

    Args:
        queries: float32 (N, dim), of length 1.
        vectors: float32 (N, dim), of length 1: those that are looked through.
        relevant: bool (N, N): which frames answer which query.
        candidate: bool (N, N): which frames are looked through for it.
    """
    likeness = np.where(candidate, queries @ vectors.T, -np.inf)
    asked = np.flatnonzero((relevant & candidate).any(1))
    firsts, precisions = [], []
    for query in asked:
        ranked = np.argsort(-likeness[query], kind="stable")[: candidate[query].sum()]
        hit = relevant[query][ranked]
        places = np.flatnonzero(hit)
        firsts.append(float(hit[0]))
        precisions.append(float(np.mean(np.arange(1, len(places) + 1) / (places + 1))))
    return Scores(asked, np.array(firsts), np.array(precisions))


def main() -> None:
    """Print a line for each task and kind of vector."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "corpus"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path(os.environ.get("EXTRACTION_TEST_CORPUS") or beside))
    parser.add_argument("--frames", type=int, default=4)
    asked = parser.parse_args()
    settings = load_settings().model_copy(update={"sampling": "uniform", "num_frames": asked.frames})
    frames = read(asked.corpus, settings, asked.frames)
    other_video = frames.video[:, None] != frames.video
    same_group, same_content = frames.group[:, None] == frames.group, frames.content[:, None] == frames.content
    print(f"{len(frames.video)} frames of {len(set(frames.video.tolist()))} videos, model {settings.model}")
    print(f"{'':35}{'':8}{'over queries':>16}{'over classes':>18}")
    print(f"{'':14}{'vectors':21}{'queries':>8}{'P@1':>8}{'mAP':>8}{'P@1':>10}{'mAP':>8}")
    plain, copies = (frames.model, frames.histogram), (frames.altered_model, frames.altered_histogram)
    for task, asked_with, relevant, candidate in (
        ("same footage", plain, same_group, other_video),
        ("same content", plain, same_content, ~same_group),
        ("altered copy", copies, same_group, np.ones_like(same_group)),
    ):
        for name, queries, vectors in zip((settings.model, "colour histogram"), asked_with, plain, strict=True):
            scores = score(queries, vectors, relevant, candidate)
            first, mean, class_first, class_mean = scores.means(frames.content)
            row = f"{len(scores.query):8}{first:8.3f}{mean:8.3f}{class_first:10.3f}{class_mean:8.3f}"
            print(f"{task:14}{name[-20:]:21}{row}")


if __name__ == "__main__":
    main()
