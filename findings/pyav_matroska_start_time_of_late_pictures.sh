#!/usr/bin/env bash
# av (PyAV) 18.1.0: in Matroska, a video stream that begins after sound says start_time 0; without sound it says when.
#
# Expected: stream.start_time is the pts of the stream's first picture: 5000 of 1/1000 s, with sound beside it or without.
# Seen:     5000 without sound; 0 with sound that begins at zero, though the first packet of the video is at 5000.
# So:       whoever takes start_time for the time of the first picture, to find its second or what is missing of a claimed
#           duration (which Matroska counts from zero), is off by the delay. Read the first packet instead.
#
# Run it: it installs the packages into a temporary folder, prints what it saw, and fails when that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/clip.mkv" <<'PYTHON'
import sys
from fractions import Fraction

import av
import numpy as np


def seen(with_sound):
    with av.open(sys.argv[1], "w") as sink:
        video = sink.add_stream("libx264", rate=10, options={"bf": "0"})
        video.width, video.height, video.pix_fmt = 160, 112, "yuv420p"
        video.codec_context.time_base = Fraction(1, 10)
        sound = sink.add_stream("aac", rate=48_000) if with_sound else None
        for number in range(280 if with_sound else 0):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = 48_000, 1024 * number, Fraction(1, 48_000)
            sink.mux(sound.encode(frame))
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(np.zeros((112, 160, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = 50 + number, Fraction(1, 10)
            sink.mux(video.encode(frame))
        sink.mux(video.encode(None))
        if sound is not None:
            sink.mux(sound.encode(None))
    with av.open(sys.argv[1]) as source:
        stream = source.streams.video[0]
        return stream.start_time, next(packet.pts for packet in source.demux(stream) if packet.size)


alone, beside = seen(False), seen(True)
print("start_time and first pts without sound:", alone)
print("start_time and first pts with sound:", beside)
if alone != (5000, 5000) or beside[0] != 0 or abs(beside[1] - 5000) > 50:
    sys.exit("this has changed")
PYTHON
