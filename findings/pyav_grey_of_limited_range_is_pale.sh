#!/usr/bin/env bash
# av (PyAV) 18.1.0 (libswscale 9): grey video of limited range comes out pale, and no argument of `reformat` helps.
#
# Expected: a grey frame that says limited range (monochrome HEVC and AV1 do) becomes RGB as the same frame in yuv420p
#           does: its 16 is black, its 235 is white.
# Seen:     16 and 235 stay 16 and 235, also with `src_color_range` named: libswscale takes every grey for full range.
# So:       expand the range yourself: (grey - 16) * 255 / 219; or add two grey planes of colour, and convert yuv420p.
#
# Run it: it installs the packages into a temporary folder, prints what it saw, and fails when that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" <<'PYTHON'
import sys

import av
import numpy as np

seen = {}
for pixels in ("gray", "yuv420p"):
    for named in (False, True):
        frame = av.VideoFrame(64, 48, pixels)
        for plane, value in zip(frame.planes, (16, 128, 128)):
            plane.update(bytes([value]) * plane.buffer_size)
        rows = np.full((48, frame.planes[0].line_size), 16, np.uint8)
        rows[:, 32:] = 235
        frame.planes[0].update(rows.tobytes())
        frame.color_range = 1  # limited
        picture = frame.reformat(format="rgb24", **({"src_color_range": 1} if named else {})).to_ndarray()
        seen[pixels, named] = [int(picture[24, 8, 0]), int(picture[24, 56, 0])]
        print(f"{pixels}, range {'named' if named else 'as the frame says'}: black and white are {seen[pixels, named]}")
if any(seen["gray", named] != [16, 235] or seen["yuv420p", named] != [0, 255] for named in (False, True)):
    sys.exit("this has changed")
PYTHON
