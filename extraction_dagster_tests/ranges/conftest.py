"""A table of tiny real videos."""

from fractions import Fraction

import numpy as np
import pytest


def render(path, seed):
    """Three seconds of noise at two frames a second: three sampled frames at one a second."""
    import av

    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(6):
            image = np.random.default_rng(10 * seed + number).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 2)
            sink.mux(stream.encode(frame))
        sink.mux(stream.encode(None))


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder with 1.mp4 and 2.mp4; read it only."""
    folder = tmp_path_factory.mktemp("clips")
    for number in (1, 2):
        render(folder / f"{number}.mp4", number)
    return folder


@pytest.fixture
def make_settings(sqlite_database, clips):
    """Settings of a table whose rows 1 and 2 are good videos and row 3 is a file that is missing."""
    sqlite_database.create(ids=(1, 2, 3))

    def make(**overrides):
        return sqlite_database.settings(allowed_roots=(str(clips),), decode_workers=1, **overrides)

    sqlite_database.execute("UPDATE insta_content SET path = :folder || '/' || path", folder=str(clips))
    return make
