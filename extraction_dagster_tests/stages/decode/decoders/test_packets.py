"""What a packet's own bytes say of its frame, and where packets end."""

from types import SimpleNamespace

import pytest

from extraction_dagster.stages.decode.decoders.container import packets_of
from extraction_dagster.stages.decode.decoders.packets import _is_hidden_vp9


def pack(*frames, mark=0b110_00_000):
    """Frames with their index: mark, a byte for each size, mark."""
    mark |= len(frames) - 1
    return b"".join(frames) + bytes([mark, *map(len, frames), mark])


@pytest.mark.parametrize(
    ("content", "hidden"),
    [
        (b"\x82\x49\x83\x42", False),  # a keyframe, shown
        (b"\x86\x00\x40\x92", False),  # another frame, shown
        (b"\x84\x00\x40\x92", True),
        (b"\x94\x00\x40\x92", True),  # profile 2
        (b"\x96\x00\x40\x92", False),
        (b"\xb2\x00\x40\x92", True),  # profile 3 has a bit more
        (b"\xb3\x00\x40\x92", False),
        (b"\x8c", False),  # nothing but: show an older frame
        (b"\xbc", False),  # the same in profile 3
        (pack(b"\x84\x00\x40", b"\x86\x01"), False),  # a hidden frame and a shown one together
        (b"\x84\x00\x40\xc9", True),  # ends like an index, and is none
        (b"\x04\x00\x40\x92", False),  # no VP9 at all: the codec will say so
    ],
)
def test_a_vp9_frame_for_reference_alone_is_known_by_its_first_byte(content, hidden):
    import av

    assert _is_hidden_vp9(av.Packet(content)) is hidden


def test_a_stream_that_turns_up_in_mid_file_ends_the_reading_and_nothing_else():
    """PyAV asks for that stream, which it does not know, when all packets have been read."""

    def demux(_stream):
        yield from [SimpleNamespace(size=size, number=number) for number, size in enumerate([7, 0, 9])]
        [].pop()

    video = SimpleNamespace(container=SimpleNamespace(demux=demux), stream=None)
    assert [packet.number for packet in packets_of(video)] == [0, 2]
