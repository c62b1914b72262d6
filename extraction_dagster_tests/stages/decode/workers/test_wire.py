"""What a worker may say: exactly what was asked for; whatever else it says is refused, and nothing else happens."""

import json
import socket
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import simplejpeg

from extraction_dagster.records import EncodedFrames
from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits
from extraction_dagster.stages.decode.quality import Quality
from extraction_dagster.stages.decode.sampling import Sampling
from extraction_dagster.stages.decode.task import DecodeJob
from extraction_dagster.stages.decode.workers import wire
from extraction_dagster.stages.decode.workers.process import send_job
from extraction_dagster.stages.decode.workers.wire import Fault, Inbox, Report, ReportError

JOB = DecodeJob(42, "v7", "/videos/a.mp4", sampling=Sampling("uniform", num_frames=3), short_side_px=8)


def jpeg(width=12, height=8, **options):
    picture = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    given = {"quality": 95, "colorspace": "RGB", "colorsubsampling": "444", **options}
    return simplejpeg.encode_jpeg(picture, **given)


def frames(**changes):
    number = np.array([0, 4, 9])
    given = EncodedFrames(
        42, "v7", [jpeg()] * 3, number / 10, number / 10, number, 12, 8, 1.5, "one is damaged", notes=("mp4: h264", "x")
    )
    return replace(given, **changes)


def message(report):
    header, body = wire.report_message(report)
    said = json.dumps(header).encode()
    return wire.SIZES.pack(len(said), sum(map(len, body))) + said + b"".join(body)


def read(content, job=JOB):
    """What the parent makes of these bytes and the worker's end."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(0.0)
        with theirs:
            theirs.sendall(content)
        found = Inbox().take(ours, wire.most_bytes_for(job))
        return None if found is None else wire.read_report(*found, job)


def same(one, two):
    for field in fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(two, field.name))


def test_frames_arrive_as_they_were_sent():
    got = read(message(Report(frames(), None, 0.25)))
    assert (got.fault, got.cpu_seconds) == (None, 0.25)
    same(got.frames, frames())
    assert (got.frames.pts_seconds.dtype, got.frames.frame_number.dtype) == (np.float64, np.int64)


def test_a_fault_arrives_as_it_was_sent_and_no_longer_than_it_may_be():
    fault = Fault("VideoDecodeError", "it is \udcff damaged", permanent=True, traceback="line 1\nline 2")
    assert read(message(Report(None, fault, 0.0))).fault == fault
    long = read(message(Report(None, Fault("E" * 999, "x" * 10**6, traceback="y" * 10**6), 0.0))).fault
    assert (len(long.error_type), len(long.message), len(long.traceback)) == (100, 8000, 20_000)


def test_a_job_arrives_as_it_was_given_with_its_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"a video")
    job = DecodeJob(
        *(-5, "v\n1", str(tmp_path / "a.mp4"), "decord", Sampling("scene", 2.5, 7, 8, 2)),
        *(
            DecodeLimits(1, 2.5, 3, 4),
            64,
            90,
            Quality(crop_bars=True, solid_deviation=1.5, duplicate_bits=6, min_frames=0),
        ),
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert send_job(ours, job)
        head, descriptors, _, _ = socket.recv_fds(theirs, 16, 4)
        header = wire.parse_header(theirs.recv(2**16))
    assert wire.SIZES.unpack(head)[1] == 0
    assert wire.read_job(header) == job
    (descriptor,) = descriptors
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
        assert file.read() == b"a video"


def test_a_job_whose_file_is_gone_says_why(tmp_path):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not send_job(ours, replace(JOB, path=str(tmp_path / "a.mp4")))
        _, descriptors, _, _ = socket.recv_fds(theirs, 16, 4)
        assert (descriptors, wire.parse_header(theirs.recv(2**16))["unopened"]) == ([], "No such file or directory")


def changed(**header):
    """A report whose header says something else."""
    given, body = wire.report_message(Report(frames(), None, 0.25))
    said = json.dumps({**given, **header}).encode()
    return wire.SIZES.pack(len(said), sum(map(len, body))) + said + b"".join(body)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (changed(record_id=43), "frames of another video"),
        (changed(content_version="v8"), "frames of another video"),
        (changed(kind="ready"), "expected at most 0"),
        (changed(num_frames=4), "num_frames 4, expected 1 to 3"),
        (changed(num_frames=2), "JPEGs of other sizes"),
        (changed(num_frames=True), "num_frames True"),
        (changed(num_frames=-(2**70)), "num_frames -1180591620717411303424"),
        (changed(width_px=13), "a JPEG that is not the 13x8"),
        (changed(width_px=9, height_px=9), "3 frames of 9x9"),
        (changed(width_px=65_501), "width_px 65501"),
        (changed(duration_seconds=float("nan")), "duration_seconds nan"),
        (changed(duration_seconds="1"), "duration_seconds '1'"),
        (changed(cpu_seconds=-1.0), "cpu_seconds -1.0"),
        (changed(notes="x"), "notes that are no list"),
        (changed(notes=["x"] * 51), "notes that are no list"),
        (changed(notes=["x" * 501]), "a note that is no text"),
        (changed(partial=["x"]), "partial that is no text"),
        (changed(partial="x" * 8001), "partial that is no text of at most 8000"),
        (changed(notes="mov"), "notes that are no list"),
        (changed(notes=["x"] * 21), "notes that are no list of at most 20"),
        (changed(notes=["x" * 501]), "a note that is no text of at most 500"),
        (changed(notes=[None]), "a note that is no text"),
        (message(Report(frames(jpegs=[b"jpeg"] * 3), None, 0.0)), "a picture that is no JPEG"),
        (message(Report(frames(jpegs=[jpeg()[:-2]] * 3), None, 0.0)), "a JPEG that is not"),
        (message(Report(frames(jpegs=[jpeg(8, 12)] * 3), None, 0.0)), "a JPEG that is not the 12x8"),
        (message(Report(frames(jpegs=[jpeg(colorsubsampling="420")] * 3), None, 0.0)), "a JPEG that is not the 12x8"),
        (message(Report(frames(jpegs=[jpeg(), jpeg(), b""]), None, 0.0)), "JPEGs of other sizes"),
        (message(Report(frames(pts_seconds=np.array([0, 1, 1e9])), None, 0.0)), "frames outside of the video"),
        (message(Report(frames(pts_seconds=np.array([-1.0, 0, 1])), None, 0.0)), "frames outside of the video"),
        (message(Report(frames(target_seconds=np.array([0, np.nan, 1])), None, 0.0)), "times that nobody asked for"),
        (message(Report(None, Fault("a name", "x"), 0.0)), "an error without a name"),
        (wire.SIZES.pack(2**40, 0), "a header of 1099511627776 bytes"),
        (wire.SIZES.pack(3, 0) + b"{]}", "a header that is no JSON"),
        (wire.SIZES.pack(100_000, 0) + b"[" * 100_000, "a header that is no JSON"),
        (wire.SIZES.pack(2, 0) + b"[]", "a header without a kind"),
        (b"cos\nsystem\n(S'touch tricked'\ntR.", "a header of"),
    ],
)
def test_what_was_not_asked_for_is_refused(content, why):
    with pytest.raises(ReportError, match=why.replace("(", r"\(")):
        read(content)


@pytest.mark.parametrize("changes", [{"pts_seconds": np.array([0.0, 2, 1])}, {"frame_number": np.array([0, 4, 4])}])
def test_frames_out_of_order_are_refused(changes):
    given, body = wire.report_message(Report(frames(), None, 0.25))
    place = {"pts_seconds": 0, "frame_number": 2}
    for name, array in changes.items():
        body[place[name]] = array.tobytes()
    said = json.dumps(given).encode()
    with pytest.raises(ReportError, match="EncodedFrames refused"):
        read(wire.SIZES.pack(len(said), sum(map(len, body))) + said + b"".join(body))


def test_a_message_may_be_as_long_as_its_frames_can_be_and_no_longer():
    most = wire.most_bytes_for(JOB)({"kind": "frames", "num_frames": 3, "width_px": 12, "height_px": 8})
    assert most == 3 * (32 + 256 * 6 + 2048)
    assert wire.most_bytes_for(JOB)({"kind": "failed"}) == 0
    with pytest.raises(ReportError, match="frames of no video"):
        wire.most_bytes_for(None)({"kind": "frames"})


@pytest.mark.parametrize(
    ("sampling", "most"),
    [
        (Sampling("fps", max_frames=600, num_frames=9), 600),
        (Sampling("uniform", max_frames=600, num_frames=9), 9),
        (Sampling("uniform", num_frames=2, min_frames=5), 5),
        (Sampling("scene", max_frames=7), 7),
    ],
)
def test_a_sampling_says_how_many_frames_it_can_give(sampling, most):
    assert sampling.most_frames == most


def mutated(content, random):
    """One to three kinds of damage: bits, bytes, parts that are blank, gone or there twice, and an early end."""
    content = bytearray(content)
    for _ in range(int(random.integers(1, 4))):
        at = int(random.integers(len(content) + 1))
        part = slice(at, at + int(2 ** random.uniform(0, 9)))
        kind = int(random.integers(7))
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << int(random.integers(8))
        elif kind == 1:
            content[part] = random.bytes(len(content[part]))
        elif kind == 2:
            content[part] = bytes([int(random.choice([0, 48, 57, 255]))]) * len(content[part])
        elif kind == 3:
            del content[part]
        elif kind == 4:
            content[part.start : part.start] = content[part]
        elif kind == 5:
            content = content[:at]
        else:  # a digit or a letter of the header becomes another
            place = int(random.integers(16, 300))
            content[place : place + 1] = bytes([int(random.integers(32, 127))])
    return bytes(content)


def test_two_thousand_damaged_reports_are_refused_or_are_what_was_asked_for():
    whole = [message(Report(frames(), None, 0.25)), message(Report(None, Fault("VideoDecodeError", "no"), 0.1))]
    found = Counter()
    for number in range(2000):
        content = mutated(whole[number % 4 == 0], np.random.default_rng((16, number)))
        try:
            report = read(content)
        except (ReportError, EOFError) as error:
            found[type(error).__name__] += 1
            continue
        assert report is not None
        found["read"] += 1
        if report.frames is not None:
            got = report.frames
            assert (got.record_id, got.content_version, len(got) <= 3) == (42, "v7", True)
            assert {simplejpeg.decode_jpeg_header(one)[:2] for one in got.jpegs} == {(got.height_px, got.width_px)}
            assert np.all(np.isfinite([got.pts_seconds, got.target_seconds]))
    # Each end is met: damage that shows, messages that never end, and damage within what may be said.
    assert min(found[name] for name in ("ReportError", "EOFError", "read")) > 100
    assert found.total() == 2000
