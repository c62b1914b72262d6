#!/usr/bin/env bash
# av (PyAV) 18.1.0: frames of some valid colour matrices can't be made RGB; naming any matrix makes them convertible.
#
# Expected: VideoFrame.to_ndarray(format="rgb24") converts a frame whose matrix is one of ITU-T H.273's, or takes the
#           nearest that libswscale has.
# Seen:     OSError 95, "Operation not supported", for YCgCo (8), BT.2020 constant luminance (10), Y'D'zD'x (11),
#           matrices derived from the primaries (12, 13), ICtCp (14), IPT-PQ-C2 (15) and the reserved code 3; with
#           src_colorspace=Colorspace.ITU709 each of them converts. What a frame says of transfer and primaries PyAV
#           keeps from libswscale for this very reason; the matrix it still shows.
# So:       whoever calls reformat or to_ndarray loses whole videos over one flag. Pass src_colorspace whenever the
#           frame's own is none of 1, 2, 4, 5, 6, 7, 9, and convert by the standard's formula if colours matter.
#
# Run it: it installs the packages into a temporary folder, prints what it saw, and fails when that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import av
from av.video.reformatter import Colorspace


def outcome(matrix, **named):
    frame = av.VideoFrame(64, 48, "yuv420p")
    frame.colorspace, frame.color_range = matrix, 1
    try:
        frame.to_ndarray(format="rgb24", **named)
    except OSError as error:
        return error.errno
    return "converted"


plain = {matrix: outcome(matrix) for matrix in range(1, 16)}
named = {outcome(matrix, src_colorspace=Colorspace.ITU709) for matrix in range(1, 16)}
refused = [matrix for matrix, what in plain.items() if what == 95]
print("refused with errno 95:", refused)
print("with src_colorspace named:", named)
if refused != [3, 8, 10, 11, 12, 13, 14, 15] or named != {"converted"}:
    sys.exit("this has changed")
PYTHON
