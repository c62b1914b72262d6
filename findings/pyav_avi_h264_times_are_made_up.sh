#!/usr/bin/env bash
# av (PyAV) 18.1.0: frames of H.264 with B-frames in AVI come out with times in the order of decoding, not of showing.
#
# Expected: AVI has no times of presentation. Packets have pts None there (as raw H.264 streams have), or frames that a
#           decoder gives in the order of showing have ascending times.
# Seen:     every packet has pts = dts + 1, and frames, which come out in the right order, carry them along: 1, 3, 4, 2 …
# So:       whoever sorts frames by pts, or seeks by it, shows them in a wrong order: up to four of five frames are
#           elsewhere. Where the container is AVI, take the decoder's order, and deal the times out again, ascending.
#
# Run it: it installs the packages into a temporary folder, prints what it saw, and fails when that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/clip.avi" <<'PYTHON'
import sys

import av
import numpy as np

with av.open(sys.argv[1], "w") as sink:
    stream = sink.add_stream("libx264", rate=10, options={"bf": "3", "x264-params": "b-adapt=0:keyint=20"})
    stream.width, stream.height, stream.pix_fmt = 160, 112, "yuv420p"
    for number in range(20):
        frame = av.VideoFrame.from_ndarray(np.full((112, 160, 3), 10 * number, np.uint8), format="rgb24")
        frame.pts = number
        sink.mux(stream.encode(frame))
    sink.mux(stream.encode(None))

with av.open(sys.argv[1]) as source:
    made_up = {packet.pts - packet.dts for packet in source.demux(video=0) if packet.size}
with av.open(sys.argv[1]) as source:
    source.streams.video[0].codec_context.thread_count = 1
    shown = [(frame.pts, float(frame.to_ndarray(format="rgb24").mean())) for frame in source.decode(video=0)]
times = [pts for pts, _ in shown]
brightness = [level for _, level in shown]
print("pts - dts of packets:", made_up)
print("times of frames in the order in which they come out:", times)
print("they come out in the order of showing:", brightness == sorted(brightness))
if made_up != {1} or times == sorted(times) or brightness != sorted(brightness):
    sys.exit("this has changed")
PYTHON
