"""Errors of one video, and of stored frames and vectors."""

from extraction_dagster.errors import SKIPPED, ExtractionError, PermanentError


class VideoOpenError(ExtractionError):
    """A file can't be opened as a video.

    Attributes:
        why: What was found.
    """

    def __init__(self, video: str, why: str) -> None:
        self.why = why
        super().__init__(f"""Video {video!r} can't be opened: {why}. Expected a complete file in a known container (mp4,
            webm, ts). {SKIPPED} Fetch the file again, then retry the record.""")


class VideoFormatError(PermanentError):
    """A file's format is one that is never opened: a playlist, a script, an archive."""

    def __init__(self, video: str, allowed: str, found: str = "") -> None:
        it_is = f"it is {found}. Its" if found else "its"
        super().__init__(f"""Video {video!r} is refused: {it_is} content is not one of the containers that are opened
            ({allowed}). Playlists and scripts are never followed, whatever their name. Convert the file to mp4.""")


class NoVideoStreamError(PermanentError):
    """A file holds no moving pictures that can be decoded."""

    def __init__(self, video: str, found: str) -> None:
        super().__init__(f"""Video {video!r} has no video stream that can be decoded: found {found}, expected at least
            one. Cover art does not count. {SKIPPED} Replace the file.""")


class VideoCodecError(PermanentError):
    """A video's codec is one that is not opened."""

    def __init__(self, video: str, codec: str) -> None:
        super().__init__(f"""Video {video!r} is refused: its codec {codec!r} is not one of EXTRACTION_VIDEO_CODECS.
            {SKIPPED} Convert it, or add {codec} there and run 'extraction retry' for the record.""")


class VideoEncryptedError(PermanentError):
    """A video is encrypted; its frames would be noise."""

    def __init__(self, video: str, scheme: str | None = None) -> None:
        how = f"encrypted ({scheme})" if scheme else "encrypted"
        super().__init__(f"""Video {video!r} is {how}: its frames would be noise. {SKIPPED} Replace it by a
            decrypted file.""")


class DolbyVisionError(PermanentError):
    """A video is Dolby Vision without a layer that other decoders can show."""

    def __init__(self, video: str, profile: int) -> None:
        super().__init__(f"""Video {video!r} is Dolby Vision profile {profile} without a compatible base layer: its
            colours can't be read by anything but Dolby's own decoders, expected HDR10, HLG, SDR or a profile with one
            of them as its base (7, 8.1, 8.4). {SKIPPED} Convert it to one of these.""")


class VideoTooLargeError(PermanentError):
    """A video's pictures have more pixels than allowed."""

    def __init__(self, video: str, *, width_px: int, height_px: int, max_pixels: int) -> None:
        super().__init__(f"""Video {video!r} is {width_px}x{height_px} ({width_px * height_px} pixels), expected at most
            {max_pixels}. It was not decoded; the range goes on. Raise EXTRACTION_MAX_PIXELS if it is meant.""")


class VideoTooLongError(PermanentError):
    """A video is longer than allowed."""

    def __init__(self, video: str, *, seconds: float, max_seconds: float) -> None:
        super().__init__(f"""Video {video!r} lasts {seconds:.0f} s or more, expected at most {max_seconds:.0f} s. It was
            not decoded; the range goes on. Raise EXTRACTION_MAX_DURATION_SECONDS if it is meant.""")


class FramesTooManyError(PermanentError):
    """The sampled frames of one video do not fit the memory set aside for them."""

    def __init__(self, video: str, *, num_frames: int, needed_bytes: int, max_bytes: int) -> None:
        super().__init__(f"""Video {video!r} would give {num_frames} frames of {needed_bytes} bytes together, expected
            at most {max_bytes}. It was not decoded; the range goes on. Lower EXTRACTION_FPS, EXTRACTION_MAX_FRAMES or
            EXTRACTION_SHORT_SIDE_PX, or raise EXTRACTION_DECODE_MEMORY_BYTES.""")


class VideoDecodeError(ExtractionError):
    """No sampled frame of a video decodes."""

    def __init__(self, video: str, *, listed_frames: int, why: str) -> None:
        listed = f" of the {listed_frames} that it lists" if listed_frames else ""
        super().__init__(f"""Video {video!r} decoded 0 frames{listed}, expected at least 1: {why}. {SKIPPED} Fetch the
            file again, then retry the record.""")


class DecoderMissingError(ExtractionError):
    """The chosen decoder is not installed."""

    def __init__(self, decoder: str, why: str) -> None:
        super().__init__(f"""Decoder {decoder!r} can't be imported: {why}. Install it, or set EXTRACTION_DECODER to
            another one.""")


class DecodeTimeoutError(ExtractionError):
    """A video took longer than its wall-clock limit."""

    def __init__(self, video: str, *, seconds: float) -> None:
        super().__init__(f"""Video {video!r} was not decoded within {seconds:g} s; its worker was stopped and replaced.
            {SKIPPED} Raise EXTRACTION_DECODE_TIMEOUT_SECONDS if it is just long.""")


class DecodeMemoryError(ExtractionError):
    """A video needed more memory than a worker may use."""

    def __init__(self, video: str, *, limit_bytes: int) -> None:
        super().__init__(f"""Video {video!r} needs more than the {limit_bytes} bytes of memory that a worker may use.
            {SKIPPED} Raise EXTRACTION_DECODE_MEMORY_BYTES if it is meant.""")


class DecodeWorkerDiedError(ExtractionError):
    """The process that decoded a video died."""

    def __init__(self, video: str, *, how: str) -> None:
        super().__init__(f"""Video {video!r} ended its worker process ({how}), which was replaced. {SKIPPED} If this
            repeats, the file is hostile or the machine is short of memory.""")


class DecodeWorkerStartError(ExtractionError):
    """A decoding process can't start: no video is to blame."""

    def __init__(self, how: str, said: str) -> None:
        super().__init__(f"""A decoding worker did not start ({how}). No record is to blame; finished shards are kept.
            Its last words: {said or "none"}.""")


class DecodeConfinementError(ExtractionError):
    """A decoding process can't be confined as the settings insist: no video is to blame."""

    def __init__(self, lacking: str) -> None:
        super().__init__(f"""Decoding workers can't be confined as EXTRACTION_REQUIRE_CONFINEMENT insists: this machine
            lacks {lacking}. No video was decoded and no record is to blame; finished shards are kept. Run where the
            kernel has it (docs/security.md says which), or unset EXTRACTION_REQUIRE_CONFINEMENT and do without.""")


class FramesRejectedError(PermanentError):
    """The quality steps left nothing of a video."""

    def __init__(self, path: str, *, num_frames: int) -> None:
        super().__init__(f"""Video {path!r} kept 0 of {num_frames} sampled frames, expected at least 1: all are of a
            single colour. {SKIPPED} Set EXTRACTION_MIN_FRAMES=1 to keep one of them, or
            EXTRACTION_REJECT_SOLID=false.""")


class PreviewError(ExtractionError):
    """There is nothing to show of a record or a file."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"No preview of {what}: {why} Nothing was written anywhere.")


class StoredFrameError(ExtractionError):
    """A frame in the frame store is no readable JPEG."""

    def __init__(self, record_id: int, frame_number: int, said: str) -> None:
        super().__init__(f"""Stored frame {frame_number} of record {record_id} is no readable JPEG ({said}), expected
            what the decode stage wrote. No vector of the record was kept; the range goes on. Its frames are set aside,
            and its next try decodes it again.""")


class ShardError(ExtractionError):
    """A shard is gone or damaged.

    Attributes:
        path: The shard's file.
        gone: It is not there any more; else its bytes are damaged.
    """

    def __init__(self, sentence: str, path: str, *, gone: bool) -> None:
        self.path, self.gone = path, gone
        super().__init__(sentence)


class EmbeddingShardError(ShardError):
    """A file is no embedding shard of this store, or it is damaged."""

    def __init__(self, path: str, got: str, expected: str, *, gone: bool = False) -> None:
        sentence = f"""Embedding shard {path!r} can't be read: got {got}, expected {expected}. Other shards are
            not touched. A run that needs its vectors sets it aside and makes them again: from the stored frames, or
            from the videos where no frames are stored."""
        super().__init__(sentence, path, gone=gone)


class FrameShardError(ShardError):
    """A frame shard can't be read back."""

    def __init__(self, path: str, why: str, *, gone: bool = False) -> None:
        sentence = f"""Frame shard {path!r} can't be read: {why}. Other shards are not touched. A run that needs its
            frames sets it aside, and the next try of each of its records decodes it again."""
        super().__init__(sentence, path, gone=gone)


class OtherSourceError(PermanentError):
    """A store holds what was made of another source table."""

    def __init__(self, what: str, address: str, *, whose: str, mine: str, setting: str) -> None:
        super().__init__(f"""The {what} in {address!r} belong to {whose}, not to {mine}. Nothing of them was read or
            written. Set {setting} (or EXTRACTION_HOME) to a place of its own for each source table; if it is the same
            table at a new address, run 'extraction init --take-over'.""")


class ShardStoreError(ExtractionError):
    """Shards can't be read or written where they are kept."""

    what: str
    setting: str

    def __init__(self, address: str, why: str) -> None:
        super().__init__(f"""The {self.what} in {address!r} can't be reached: {why}. No record is to blame, and what was
            written is kept. Correct {self.setting}, or the store's own configuration (AWS_… variables, say); then run
            the range again.""")


class FrameStoreError(ShardStoreError):
    """Frames can't be read or written where they are kept."""

    what, setting = "frames", "EXTRACTION_FRAMES_URI"


class EmbeddingStoreError(ShardStoreError):
    """Vectors can't be read or written where they are kept."""

    what, setting = "vectors", "EXTRACTION_EMBEDDINGS_URI"


class FramesExportError(ExtractionError):
    """Frames can't be exported."""

    def __init__(self, path: str, why: str, *, survives: str) -> None:
        super().__init__(f"Frames can't be exported to {path!r}: {why}. {survives}")
