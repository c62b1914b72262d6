"""A frame's second is where a player seeks to, whatever container, sound, pieces and wrong stamps do to the clock."""

from fractions import Fraction

import numpy as np
import pytest

from extraction_dagster.errors.decode import VideoDecodeError, VideoTooLongError
from extraction_dagster.stages.decode.decoders import sequential
from extraction_dagster.stages.decode.decoders.container import open_file, open_video
from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits
from extraction_dagster.stages.decode.decoders.decord import decode_with_decord
from extraction_dagster.stages.decode.decoders.packets import read_packets
from extraction_dagster.stages.decode.decoders.pyav import decode_with_pyav
from extraction_dagster.stages.decode.sampling import Sampling

EVERY_FRAME = Sampling("fps", fps=1e6)
SIXTEEN = Sampling("uniform", num_frames=16)
RATE = 24
# Parameters in the stream tell how many frames are reordered, so that a container without times is seen to lack them.
B_FRAMES = {"bf": "3", "x264-params": "b-adapt=0:keyint=12:min-keyint=12:scenecut=0"}


def decode(path, sampling=EVERY_FRAME, decoder=decode_with_pyav):
    return decoder(path, sampling=sampling, short_side_px=112, limits=DecodeLimits())


@pytest.fixture
def numbers_of(number_in):
    return lambda video: [number_in(picture) for picture in video.frames.data]


@pytest.fixture(scope="module")
def plain(render, tmp_path_factory):
    """48 frames in two seconds, each packet by itself in order."""
    return render(tmp_path_factory.mktemp("plain") / "plain.mp4", frames=48, options={"bf": "0"})


def remux(source, out, *, moved=lambda _number: 0, sound=None, options=None, order=True, talk_seconds=0):  # noqa: PLR0913 - each by name
    """The pictures of `source`, each packet moved by some seconds; sound from and to two seconds of the clock.

    Without `order`, only the time of showing moves, not that of decoding.
    """
    import av

    with av.open(str(source)) as there, av.open(str(out), "w", options=options or {}) as here:
        pictures = here.add_stream_from_template(there.streams.video[0])
        if out.suffix == ".avi":  # which counts frames
            pictures.time_base = Fraction(1, RATE)
        tone = here.add_stream("libmp3lame" if out.suffix == ".avi" else "aac", rate=48_000) if sound else None
        for packet in heard(tone, *sound) if sound else ():
            here.mux(packet)
        if talk_seconds:  # one more packet of sound, that long
            here.mux(long_packet(tone, sound[1], talk_seconds))
        for number, packet in enumerate(packet for packet in there.demux(video=0) if packet.size):
            move = round(moved(number) / packet.time_base)
            packet.stream, packet.pts, packet.dts = pictures, packet.pts + move, packet.dts + (move if order else 0)
            here.mux(packet)
    return out


def long_packet(stream, start, seconds):
    import av

    packet = av.Packet(b"\x21\x10\x04\x60\x8c\x1c")
    packet.stream, packet.time_base = stream, Fraction(1, 48_000)
    packet.pts = packet.dts = start * 48_000 + 2048
    packet.duration = seconds * 48_000
    return packet


def heard(stream, start, end):
    import av

    for number in range(round((end - start) * 48_000 / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 48_000, round(start * 48_000) + number * 1024
        frame.time_base = Fraction(1, 48_000)
        yield from stream.encode(frame)
    yield from stream.encode(None)


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts", "late.flv", "late_fragments.mp4"])
def test_pictures_that_start_after_sound_are_at_the_seconds_of_a_players_clock(name, plain, tmp_path, numbers_of):
    options = {"movflags": "frag_keyframe+empty_moov+delay_moov"} if "fragments" in name else {}
    late = remux(plain, tmp_path / name, moved=lambda _: 5, sound=(0, 7), options=options)
    video = decode(late)
    assert numbers_of(video) == list(range(48))
    assert video.frames.pts_seconds == pytest.approx(5 + np.arange(48) / RATE, abs=0.03)  # sound has a lead of a frame
    assert video.partial is None
    assert video.duration_seconds == pytest.approx(2, abs=0.1)
    assert any("pictures start" in note for note in video.notes)
    # The choice of frames is that of the pictures alone.
    chosen = decode(late, SIXTEEN).frames
    assert chosen.frame_number.tolist() == decode(plain, SIXTEEN).frames.frame_number.tolist()
    assert (chosen.target_seconds >= 4.9).all()


def test_a_picture_of_avi_stays_as_long_as_empty_packets_follow(tmp_path):
    import av

    shown = [0, 1, 2, 9, 10, 20, 21, 22]
    with av.open(str(tmp_path / "held.avi"), "w") as container:
        pictures = container.add_stream("libx264", rate=10, options={"bf": "0"})
        pictures.width, pictures.height = 64, 48
        for number in (*shown, None):
            frame = None if number is None else av.VideoFrame(64, 48, "yuv420p")
            if frame is not None:
                frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(pictures.encode(frame))
    video = decode(tmp_path / "held.avi", Sampling("uniform", num_frames=40))
    assert video.frames.pts_seconds == pytest.approx(np.array(shown) / 10, abs=0.002)
    assert video.partial is None


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv"])
def test_decord_is_told_when_pictures_start(name, plain, tmp_path):
    late = remux(plain, tmp_path / name, moved=lambda _: 5, sound=(0, 7))
    video = decode(late, Sampling("uniform", num_frames=4), decode_with_decord)
    assert video.frames.pts_seconds == pytest.approx([5.25, 5.75, 6.25, 6.75], abs=0.05)
    assert video.partial is None


def test_pictures_that_start_late_without_sound_start_at_zero(plain, tmp_path):
    video = decode(remux(plain, tmp_path / "late.mkv", moved=lambda _: 5))
    assert video.frames.pts_seconds[[0, 47]] == pytest.approx([0, 47 / RATE], abs=0.002)


def test_a_fragmented_file_tells_when_its_sound_starts_without_a_probe(plain, tmp_path):
    options = {"movflags": "frag_keyframe+empty_moov+delay_moov"}
    path = remux(plain, tmp_path / "late.mp4", moved=lambda _: 0.5, sound=(0, 3), options=options)
    late = []
    for probe in (False, True):
        with open_file(path) as file, open_video(file, DecodeLimits(), probe=probe) as video:
            late.append(video.late_seconds(int(read_packets(video, DecodeLimits()).pts.min())))
    assert late[0] == late[1] == pytest.approx(0.5, abs=0.03)


def test_an_edit_list_that_shows_nothing_is_left_out(plain, tmp_path, numbers_of):
    content = bytearray(plain.read_bytes())
    at = content.index(b"elst")
    content[at + 12 : at + 16] = bytes(4)  # as long as the whole, in some files
    (tmp_path / "none.mp4").write_bytes(content)
    video = decode(tmp_path / "none.mp4", Sampling("uniform", num_frames=48))
    assert numbers_of(video) == list(range(48))
    assert "an edit list that shows nothing is left out" in video.notes


def test_a_file_whose_every_packet_stays_hidden_is_refused_after_a_second_look(plain, monkeypatch):
    looks = []

    def see_nothing(video, tally):
        looks.append(video.file.ignores_edits)
        tally.packets = tally.hidden = 3
        return iter(())

    monkeypatch.setattr(sequential, "_decode_all", see_nothing)
    with open_file(plain) as file, pytest.raises(VideoDecodeError, match="3 packets gave no frame"):
        sequential.decode_sequentially(file, Sampling("uniform", num_frames=2), 112, DecodeLimits())
    assert looks == [False, True]


@pytest.mark.parametrize("name", ["no.mp4", "no.flv"])
def test_where_only_times_of_decoding_are_said_frames_come_in_their_order(name, render, tmp_path, numbers_of):
    whole = render(tmp_path / "whole.mp4", frames=48, options=B_FRAMES)
    path = tmp_path / "no.mp4"  # without the boxes that tell them from those of showing
    path.write_bytes(whole.read_bytes().replace(b"ctts", b"free").replace(b"edts", b"free"))
    path = path if name == "no.mp4" else remux(path, tmp_path / name)
    for count in (48, 5):
        video = decode(path, Sampling("uniform", num_frames=count))
        assert len(video.frames) == count
        assert numbers_of(video) == video.frames.frame_number.tolist()
        assert video.frames.pts_seconds == pytest.approx(video.frames.frame_number / RATE, abs=0.002)


@pytest.mark.parametrize("name", ["longer.mkv", "longer.mp4", "longer.ts", "longer.asf"])
def test_sound_that_goes_on_makes_no_video_partial(name, plain, tmp_path):
    assert decode(remux(plain, tmp_path / name, sound=(0, 9))).partial is None


def without_tags(path):
    """Each track's own duration gone: the file claims one for all."""
    path.write_bytes(path.read_bytes().replace(b"DURATION", b"DURATIOM"))
    return path


def test_where_a_container_claims_one_length_for_all_the_sound_is_looked_at(plain, tmp_path):
    assert decode(without_tags(remux(plain, tmp_path / "longer.mkv", sound=(0, 9)))).partial is None
    cut = without_tags(remux(plain, tmp_path / "cut.mkv", moved=lambda number: number / RATE * 4, sound=(0, 9)))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 3])
    assert "of the 9" in (decode(cut).partial or "")


def test_a_fragment_that_begins_late_lasts_as_long_as_what_it_shows(plain, tmp_path):
    options = {"movflags": "frag_keyframe+empty_moov+delay_moov"}
    late = remux(plain, tmp_path / "fragment.mp4", moved=lambda _: 600, options=options)
    video = decode(late)
    assert (video.partial, video.frames.pts_seconds[0]) == (None, 0)
    assert video.duration_seconds == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("number", "hours"), [(1, 0.01), (20, 0.01), (1, 1), (20, 10.4), (47, 1), (47, 10.4)])
def test_one_stamp_that_is_late_costs_that_frame_alone(number, hours, plain, tmp_path, numbers_of):
    path = remux(plain, tmp_path / "wrong.mp4", moved=lambda n: hours * 3600 if n == number else 0, order=False)
    video = decode(path, SIXTEEN)
    assert numbers_of(video) == numbers_of(decode(plain, SIXTEEN))
    assert video.partial is None
    assert decode(path).frames.pts_seconds == pytest.approx(np.arange(48) / RATE, abs=0.03)


@pytest.mark.parametrize(
    ("name", "seconds"), [("jump.mkv", 7200), ("jump.mp4", 7200), ("jump.ts", 7200), ("jump.ts", 60)]
)
def test_a_clock_that_jumps_goes_on_where_it_was(name, seconds, plain, tmp_path, numbers_of):
    video = decode(remux(plain, tmp_path / name, moved=lambda n: seconds if n >= 30 else 0), SIXTEEN)
    assert numbers_of(video) == numbers_of(decode(plain, SIXTEEN))
    assert video.frames.pts_seconds[-1] < 2


def test_a_still_of_an_hour_with_sound_is_no_jump(plain, tmp_path):
    path = remux(plain, tmp_path / "talk.mp4", moved=lambda n: 3600 if n == 47 else 0, sound=(0, 1), talk_seconds=3601)
    video = decode(path, Sampling("fps", fps=RATE))
    assert video.frames.pts_seconds[-2:] == pytest.approx([46 / RATE, 3600 + 47 / RATE], abs=0.03)


def test_sound_that_jumps_with_the_pictures_is_no_still(plain, tmp_path, numbers_of):
    pieces = [
        remux(plain, tmp_path / f"{start}.ts", moved=lambda _, by=start: by, sound=(start, start + 2))
        for start in (0, 7200)
    ]
    (tmp_path / "joined.ts").write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    video = decode(tmp_path / "joined.ts", SIXTEEN)
    assert numbers_of(video) == [*range(3, 48, 6)] * 2
    assert video.frames.pts_seconds[-1] < 5


def test_a_video_that_is_really_too_long_is_refused_by_its_packets(plain, tmp_path):
    slow = remux(plain, tmp_path / "slow.mkv", moved=lambda n: n * 1000)
    with pytest.raises(VideoTooLongError, match="expected at most 21600 s"):
        decode(slow)


def test_the_limit_holds_for_the_second_that_is_told(plain, tmp_path):
    late = remux(plain, tmp_path / "late.mp4", moved=lambda _: 5, sound=(0, 7))
    with pytest.raises(VideoTooLongError, match="lasts 7 s or more, expected at most 6 s"):
        decode_with_pyav(late, sampling=EVERY_FRAME, short_side_px=112, limits=DecodeLimits(max_duration_seconds=6.0))


def forget_times(path):
    """MPEG-TS: of each PES packet but those of random access points, the times are taken out."""
    data = bytearray(path.read_bytes())
    for start in range(0, len(data), 188):
        adapted, at, opens = data[start + 3] >> 4 & 2, start + 4, data[start + 1] & 0x40
        random_access = adapted and data[at] and data[at + 1] & 0x40
        at += 1 + data[at] if adapted else 0
        if not opens or random_access or data[at : at + 3] != b"\0\0\1" or data[at + 3] & 0xF0 != 0xE0:
            continue
        size = {0: 0, 2: 5, 3: 10}[data[at + 7] >> 6]
        data[at + 7] &= 0x3F
        data[at + 9 : at + 9 + size] = b"\xff" * size
    path.write_bytes(data)


def test_packets_without_a_time_are_not_at_zero(plain, tmp_path, numbers_of):
    path = remux(plain, tmp_path / "rare.ts", moved=lambda _: 20 * 3600)
    forget_times(path)
    video = decode(path)
    assert numbers_of(video) == list(range(48))
    assert video.frames.pts_seconds == pytest.approx(np.arange(48) / RATE, abs=0.03)


@pytest.mark.parametrize("step_back", [0.02, 0.3, 1.9, 2.0])
def test_joined_pieces_keep_every_frame_however_little_the_clock_steps_back(step_back, plain, tmp_path, numbers_of):
    pieces = [
        remux(plain, tmp_path / f"{number}.ts", moved=lambda _, n=number: (2 - step_back) * n) for number in range(3)
    ]
    (tmp_path / "joined.ts").write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    video = decode(tmp_path / "joined.ts")
    assert numbers_of(video) == [*range(48)] * 3
    assert (np.diff(video.frames.pts_seconds) > 0).all()
    assert video.frames.pts_seconds[-1] == pytest.approx(6, abs=0.4)


@pytest.mark.parametrize(
    ("name", "codec"), [("b.avi", "libx264"), ("b.h264", "libx264"), ("b.hevc", "libx265"), ("b.avi", "mpeg4")]
)
def test_without_times_of_presentation_frames_come_in_the_order_of_showing(name, codec, render, tmp_path, numbers_of):
    hevc = {"x265-params": "log-level=none:keyint=12:bframes=3:b-adapt=0:pools=none:frame-threads=1"}
    options = {"libx264": B_FRAMES, "libx265": hevc, "mpeg4": {"bf": "2", "b": "2M"}}[codec]
    video = decode(render(tmp_path / name, codec=codec, frames=48, options=options))
    assert numbers_of(video) == list(range(48))
    assert video.frames.pts_seconds == pytest.approx(np.arange(48) / RATE, abs=0.001)
    assert video.partial is None


def test_what_is_known_of_the_clock_is_noted(plain, tmp_path):
    wrong = remux(plain, tmp_path / "wrong.mp4", moved=lambda n: 37_000 if n == 20 else 0, order=False)
    assert "clock: 1 frames with a missing or wrong time" in decode(wrong).notes
    assert decode(plain).notes[0] == "mov: h264, 160x112"


DECORD_IS_WRONG = {
    "one stamp that is late": "decord sorts frames by their stamps, and uniform gives one frame",
    "a clock that jumps": "decord spreads the video over the jump, and uniform gives one frame",
    "few times": "decord takes a packet without a time for time zero",
    "joined pieces": "decord finds frames by time, which joined pieces have twice",
    "B-frames in AVI": "decord has no times there, and shows another frame",
    "a raw stream": "decord needs a duration",
}


@pytest.fixture(params=DECORD_IS_WRONG)
def odd(request, plain, render, tmp_path):
    """A file of 48 frames (of joined pieces, twice as many), whose clock decord does not mend."""
    if request.param == "one stamp that is late":
        return remux(plain, tmp_path / "a.mp4", moved=lambda n: 3600 if n == 20 else 0, order=False)
    if request.param == "a clock that jumps":
        return remux(plain, tmp_path / "a.mp4", moved=lambda n: 7200 if n >= 30 else 0)
    if request.param == "few times":
        path = remux(plain, tmp_path / "a.ts", moved=lambda _: 20 * 3600)
        forget_times(path)
        return path
    if request.param == "joined pieces":
        piece = remux(plain, tmp_path / "piece.ts").read_bytes()
        (tmp_path / "a.ts").write_bytes(piece * 2)
        return tmp_path / "a.ts"
    return render(tmp_path / ("a.avi" if "AVI" in request.param else "a.h264"), frames=48, options=B_FRAMES)


@pytest.mark.parametrize("decoder", [decode_with_pyav, decode_with_decord], ids=["pyav", "decord"])
def test_every_part_of_a_video_with_an_odd_clock_is_seen(decoder, odd, numbers_of, request):
    if decoder is decode_with_decord:
        why = DECORD_IS_WRONG[request.node.callspec.params["odd"]]
        request.applymarker(pytest.mark.xfail(reason=why, strict=True))
    video = decode(odd, Sampling("uniform", num_frames=12), decoder)
    joined = request.node.callspec.params["odd"] == "joined pieces"
    assert numbers_of(video) == ([*range(4, 48, 8)] * 2 if joined else [*range(2, 48, 4)])
