#!/usr/bin/env bash
# av (PyAV) 18.1.0: a photo's Exif hides how the photo is to be turned and mirrored.
#
# Expected: a JPEG with an Exif orientation decodes to a frame whose side data is its display matrix, beside the Exif;
#           FFmpeg 8 makes that matrix of all eight orientations.
# Seen:     reading `frame.side_data` raises ValueError, "31 is not a valid Type", since PyAV has no name for Exif; so
#           does every JPEG, PNG, WebP and AVIF with an orientation. `frame.rotation` is left, an angle: 180 for "mirrored
#           left to right", as for "half a turn".
# So:       delete the side data whose number the error names by libavfilter's `sidedata`; the rest can be read then.
#
# Run it: it installs the packages into a temporary folder, prints what it saw, and fails when that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" <<'PYTHON'
import io
import struct
import sys
from fractions import Fraction

import av
import numpy as np
from av.filter import Graph

encoder = av.CodecContext.create("mjpeg", "w")
encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 64, 48, "yuvj420p", Fraction(1, 25)
grey = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), format="rgb24").reformat(format="yuvj420p")
jpeg = bytes((encoder.encode(grey) + encoder.encode(None))[0])


def with_orientation(number):
    tag = struct.pack("<HHIHH", 0x0112, 3, 1, number, 0)
    body = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + tag + bytes(4)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


seen = {}
for orientation in (2, 3):
    with av.open(io.BytesIO(with_orientation(orientation)), format="jpeg_pipe") as source:
        frame = next(source.decode(video=0))
    try:
        list(frame.side_data)
        sys.exit("this has changed: side data can be read")
    except ValueError as error:
        words = str(error)
    graph = Graph()
    start = graph.add_buffer(width=64, height=48, format=frame.format, time_base=Fraction(1, 25))
    end = graph.add("buffersink")
    graph.link_nodes(start, graph.add("sidedata", f"mode=delete:type={words.split()[0]}"), end).configure()
    start.push(frame)
    (matrix,) = (item for item in end.pull().side_data if item.type.name == "DISPLAYMATRIX")
    seen[orientation] = (words, abs(frame.rotation), np.frombuffer(bytes(matrix), np.int32)[[0, 1, 3, 4]].tolist())
    print(f"orientation {orientation}: {words!r}; rotation {frame.rotation}; matrix {seen[orientation][2]}")
if seen[2][1] != seen[3][1] or seen[2][2] != [-65536, 0, 0, 65536] or seen[3][2] != [-65536, 0, 0, -65536]:
    sys.exit("this has changed")
PYTHON
