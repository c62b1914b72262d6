"""Every error that this project raises on purpose.

The caller passes facts, the class writes the sentence: the culprit, what was got, what was expected; what survives;
the fix. A class whose name a user may filter by (`extraction errors --type`) is part of the interface.
"""

from __future__ import annotations

from extraction_dagster.addresses import shown_address


class ExtractionError(Exception):
    """Base of the family.

    Attributes:
        permanent: Trying again can't help; the record is parked at once.
    """

    permanent: bool = False

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild the error from its finished sentence, so that it crosses process boundaries."""
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(kind: type[ExtractionError], args: tuple[object, ...], state: dict[str, object]) -> ExtractionError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


def _one_line(said: str, most: int = 500) -> str:
    """What a stranger's file says, fit for a terminal: no line break, no escape sequence, of some length."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in said[:most])


class SettingsError(ExtractionError):
    """A setting is wrong, unknown, or does not fit another."""

    def __init__(self, setting: str, got: str, expected: str) -> None:
        """Name the setting, what was got and what was expected."""
        super().__init__(
            f"Setting {setting} is {got}, expected {expected}. Correct it in the environment or in .env; "
            f"'extraction doctor' lists every setting."
        )


class PartitionKeyError(ExtractionError):
    """A partition key is not a range of ids."""

    def __init__(self, key: str, why: str) -> None:
        """Name the key and what is wrong with it."""
        super().__init__(
            f"{key!r} is not a range of ids: {why}. Expected FIRST-LAST with both ends included, for example 1-1000."
        )


class RecordShapeError(ExtractionError):
    """A record between rooms was built from arrays that do not fit together; a bug, never a user's mistake."""

    def __init__(self, record: str, why: str, shapes: str) -> None:
        """Name the record, the rule and every shape."""
        super().__init__(f"{record} refused: {why}; got {shapes}.")


# Catalog


class DatabaseUrlError(ExtractionError):
    """A database URL can't be used."""

    def __init__(self, setting: str, *, driver: str | None = None) -> None:
        """Name the setting, never its value."""
        got = f"names the driver {driver!r}, which is not installed" if driver else "is not a database URL"
        super().__init__(
            f"Setting {setting} {got}, expected for example postgresql://USER:PASSWORD@HOST:5432/DATABASE or "
            f"sqlite:////path/to/file.db (value not shown)."
        )


class SourceUnreachableError(ExtractionError):
    """A database can't be reached, read or written."""

    def __init__(self, what: str, url: str, reason: str) -> None:
        """Name what was tried, where, and the database's own words."""
        super().__init__(
            f"Cannot {what} at {url}: {' '.join(reason.split())}. Nothing was changed. "
            f"Check that the database runs and that its user has the rights, then try again."
        )


class SourceTableError(ExtractionError):
    """The source table is missing, or lacks what is needed of it."""

    def __init__(self, table: str, why: str, fix: str) -> None:
        """Name the table, what is wrong and the fix."""
        super().__init__(f"Source table {table!r} can't be used: {why}. {fix}")


class PredicateError(ExtractionError):
    """EXTRACTION_SOURCE_PREDICATE can't be used."""

    def __init__(self, text: str, why: str, columns: list[str]) -> None:
        """Name the predicate, what is wrong with it and the columns there are."""
        super().__init__(
            f"Setting EXTRACTION_SOURCE_PREDICATE is {text!r}: {why}. Expected a condition such as "
            f"is_downloaded AND NOT is_removed over the columns {', '.join(columns)}."
        )


class StateError(ExtractionError):
    """The state tables belong to another source, or to another version of this project."""

    def __init__(self, why: str, fix: str) -> None:
        """Say what is wrong and the fix."""
        super().__init__(f"The state tables can't be used: {why}. {fix}")


class EmptyRangeError(ExtractionError):
    """A range was asked for that holds no eligible row."""

    def __init__(self, key: str, table: str, extent: tuple[int, int] | None) -> None:
        """Name the range, and where rows are."""
        rows = f"its eligible rows have ids {extent[0]} to {extent[1]}" if extent else "it has no eligible row at all"
        super().__init__(
            f"Range {key} holds no eligible row of {table!r}: {rows}. Nothing was done. "
            f"Choose a range that overlaps the table's ids, or wait until rows arrive."
        )


# Dagster


class InstanceError(ExtractionError):
    """The Dagster instance can't be opened."""

    def __init__(self, home: str, reason: str) -> None:
        """Name the folder and what is wrong with it."""
        super().__init__(
            f"DAGSTER_HOME is {home!r}, and no Dagster instance opens there: {reason}. "
            f"Set DAGSTER_HOME to the folder that holds dagster.yaml, or unset it to use the one under EXTRACTION_HOME."
        )


class RangeBusyError(ExtractionError):
    """A range was launched that has an active run."""

    def __init__(self, key: str, run_id: str) -> None:
        """Name the range and the run."""
        super().__init__(
            f"Range {key} has an active run, {run_id}: nothing was launched. "
            f"Wait until it ends, or terminate it in the UI."
        )


class SensorBusyError(ExtractionError):
    """A command would tick while a daemon ticks."""

    def __init__(self) -> None:
        """Say what to do instead."""
        super().__init__(
            "A Dagster daemon is running the sensor, and processes new rows itself: nothing is started beside it. "
            "Watch it with 'extraction status' or in the UI, or stop the sensor there first. A daemon that was stopped "
            "counts as running for three minutes more."
        )


class RunFailedError(ExtractionError):
    """A run that a command launched has failed."""

    def __init__(self, key: str, run_id: str, reason: str) -> None:
        """Name the range, the run and the failed step's own sentence."""
        super().__init__(
            f"Range {key} failed (run {run_id}): {reason} "
            f"What was finished is kept; 'extraction launch {key}' goes on from there."
        )


# Checkpoint


class CursorError(ExtractionError):
    """What the cursor store keeps can't be used."""

    def __init__(self, why: str) -> None:
        """Say what is wrong with it."""
        super().__init__(
            f"The stored cursor can't be used: {why}. Nothing was changed, and the rows still know what is done. "
            f"Look at it with 'extraction checkpoint show'; 'extraction checkpoint reset --storage cursor' "
            f"derives it anew from the rows."
        )


class MirrorError(ExtractionError):
    """A mirror of the checkpoint can't be reached."""

    def __init__(self, name: str, action: str, reason: str) -> None:
        """Name the mirror, what was tried and why it failed."""
        super().__init__(
            f"Checkpoint mirror {name} can't be {action}: {reason}. The cursor store is not affected. "
            f"Restore access to it, or set EXTRACTION_CHECKPOINT_MIRROR=none."
        )


class LostCursorError(ExtractionError):
    """The cursor store is empty and the mirror, which would speak for it, is corrupt."""

    def __init__(self, name: str, why: str) -> None:
        """Name the mirror and what is wrong with it."""
        super().__init__(
            f"The cursor store is empty, and checkpoint mirror {name} is corrupt: {why}. Nothing was started. Mend or "
            f"remove it, or say where to start with 'extraction checkpoint set ID' or 'extraction checkpoint reset'."
        )


# The index room. A store's fault is no record's fault, so none of these parks a record, except PayloadError.


class PayloadError(ExtractionError):
    """A row's column can't become part of a point's payload."""

    permanent = True

    def __init__(self, record_id: int, column: str, why: str) -> None:
        """Name the record, the column and what is wrong with its value."""
        self.record_id = record_id
        super().__init__(
            f"Column {column!r} of record {record_id} can't be kept in a point's payload: {why}. Nothing was written "
            f"for it. Correct the value, or leave the column out of EXTRACTION_SOURCE_PAYLOAD_COLUMNS; then run "
            f"'extraction retry {record_id}'."
        )


# Embedding


class EmbeddingModelError(ExtractionError):
    """No model goes by the name that was set."""

    permanent = True

    def __init__(self, name: str, why: str, available: str) -> None:
        """Name the model, what is wrong with the name, and the models there are."""
        super().__init__(
            f"No embedding model {name!r}: {why}. Available: {available}. Set EXTRACTION_MODEL to one of them."
        )


class ModelFilesError(ExtractionError):
    """A model's files are missing, damaged or refused; nothing was embedded with them."""

    permanent = True

    def __init__(self, model: str, where: str, got: str, expected: str, fix: str) -> None:
        """Name the model, its files, what was found and what was expected, and the fix."""
        super().__init__(
            f"Model {model!r} can't be loaded from {where}: got {_one_line(got)}, expected {_one_line(expected)}. "
            f"Nothing was written. {fix}"
        )


class ModelLibraryError(ExtractionError):
    """A package that a model needs is not installed."""

    permanent = True

    def __init__(self, model: str, package: str, extra: str) -> None:
        """Name the model, the package and the extra that brings it."""
        super().__init__(
            f"Model {model!r} needs the package {package!r}, which is not installed. Nothing was written. "
            f"Install it: pip install 'extraction-dagster[{extra}]'."
        )


class EmbeddingDeviceError(ExtractionError):
    """The device that was set is not there."""

    permanent = True

    def __init__(self, device: str, available: str) -> None:
        """Name the device that was set and those that are there."""
        super().__init__(
            f"Device {device!r} is not available, this machine's torch sees: {available}. "
            f"Set EXTRACTION_DEVICE to one of them, or to auto."
        )


class EmbeddingMemoryError(ExtractionError):
    """Not even one frame fits into the device's memory."""

    def __init__(self, model: str, device: str, said: str) -> None:
        """Name the model, the device and what the allocator said."""
        super().__init__(
            f"Model {model!r} ran out of memory on {device} with a batch of 1 frame, after halving it down to that "
            f"({said}). Finished shards are kept. Free memory on {device}, or choose a smaller EXTRACTION_MODEL or "
            f"another EXTRACTION_DEVICE, then run the range again."
        )


class ModelOutputError(ExtractionError):
    """A model gave something else than one vector per frame; a fault of the model, never of a record."""

    permanent = True

    def __init__(self, model: str, got: str, expected: str) -> None:
        """Name the model, the shape and dtype that it gave and those expected."""
        super().__init__(f"Model {model!r} gave {got}, expected {expected}. Finished shards are kept.")


class InvalidVectorError(ExtractionError):
    """A frame's vector can't be searched: it has NaN, an infinite value, or no length."""

    def __init__(self, record_id: int, frame_number: int, model: str, got: str) -> None:
        """Name the record, the frame, the model and what is wrong with the vector."""
        super().__init__(
            f"Frame {frame_number} of record {record_id} got a vector with {got} from model {model!r}, expected finite "
            f"values and a length above zero. No vector of the record was kept; the range goes on. "
            f"'extraction retry {record_id}' tries it again."
        )


class StoredFrameError(ExtractionError):
    """A frame in the frame store is no readable JPEG."""

    def __init__(self, record_id: int, frame_number: int, said: str) -> None:
        """Name the record, the frame and what the JPEG library said."""
        super().__init__(
            f"Stored frame {frame_number} of record {record_id} is no readable JPEG ({said}), expected what the decode "
            f"stage wrote. No vector of the record was kept; the range goes on. Decode it again, then "
            f"'extraction retry {record_id}'."
        )


class VectorNormError(ExtractionError):
    """A vector is not L2-normalised: its cosine would be meaningless."""

    def __init__(self, record_id: int, frame_number: int, norm: float) -> None:
        """Name the record, the frame and the norm."""
        self.record_id = record_id
        super().__init__(
            f"The vector of record {record_id}, frame {frame_number}, has norm {norm:.4g}, expected 1: its shard is "
            f"damaged. Nothing was written for the record; the range goes on. 'extraction retry {record_id}' embeds it "
            f"anew."
        )


class PointStoreError(ExtractionError):
    """The store of points could not do what was asked; its kinds say how and why."""


class StoreEngineError(PointStoreError):
    """The engine behind the store failed."""

    def __init__(self, operation: str, where: str, why: str) -> None:
        """Name the operation, the store and the engine's own words."""
        super().__init__(
            f"Could not {operation} in {where}: {why}. Rows are marked only after their points are verified, so "
            f"nothing is lost: the range is tried again."
        )


class StoreNotOpenError(PointStoreError):
    """A store was used before its collection was opened; a bug, never a user's mistake."""

    def __init__(self, operation: str, where: str) -> None:
        """Name the operation and the store."""
        super().__init__(
            f"Could not {operation} in {where}: no collection is open. Call ensure_collection or open_collection first."
        )


class StoreBusyError(PointStoreError):
    """Another process holds the embedded store."""

    def __init__(self, path: str, holder: str) -> None:
        """Name the folder and, as far as known, the holder."""
        super().__init__(
            f"The points in {path} are held by {holder}: the embedded store serves one process at a time, usually a "
            f"running qdrant_points step. Nothing was changed. Wait for it to end and try again, or set "
            f"EXTRACTION_QDRANT_URL to a server, which serves many."
        )


class StoreUnreadableError(PointStoreError):
    """The embedded store's files can't be read."""

    def __init__(self, path: str, why: str) -> None:
        """Name the file or folder and what is wrong with it."""
        super().__init__(
            f"The points in {path} can't be read: {why}. Frames, embeddings and the table are untouched, and points "
            f"can be rebuilt from them: move the folder aside, then run 'extraction reconcile --repair'."
        )


class StoreUnavailableError(PointStoreError):
    """The Qdrant server kept failing in a way that may pass."""

    def __init__(self, operation: str, url: str, attempts: int, why: str) -> None:
        """Name the operation, the server, the number of tries and the last reason."""
        super().__init__(
            f"Could not {operation} at {url} in {attempts} tries; the last one: {why}. No row was marked, so nothing "
            f"is lost: the range is tried again. Check that the server is up and reachable on its gRPC port."
        )


class StoreRefusedError(PointStoreError):
    """The Qdrant server refused a call; asking again would not help."""

    def __init__(self, operation: str, url: str, why: str) -> None:
        """Name the operation, the server and its reason."""
        super().__init__(
            f"The server at {url} refused to {operation}: {why}. No row was marked. Check EXTRACTION_QDRANT_URL, "
            f"EXTRACTION_QDRANT_API_KEY and the rights of that key."
        )


class CollectionMissingError(PointStoreError):
    """There is no such collection, or none yet."""

    def __init__(self, name: str, where: str) -> None:
        """Name the collection and the store."""
        super().__init__(
            f"There is no collection {name!r} in {where}; 'extraction collection list' shows those that there are. The "
            f"first one comes with the first points: run 'extraction launch FIRST-LAST' on a range, or check "
            f"EXTRACTION_COLLECTION_NAME and EXTRACTION_QDRANT_URL."
        )


class CollectionMismatchError(PointStoreError):
    """A collection holds vectors of another model, or of the same model with other settings."""

    def __init__(self, name: str, where: str, *, got: str, expected: str) -> None:
        """Name the collection and both kinds of vectors, each as dim and fingerprint."""
        super().__init__(
            f"Collection {name!r} in {where} holds vectors of {got}, but the settings give {expected}: their scores "
            f"could not be compared. Nothing was changed. Set EXTRACTION_MODEL back, or change the model without a "
            f"pause: 'extraction collection stage', then 'extraction launch FIRST-LAST' for every range, then "
            f"'extraction collection publish'; searches use the old one until then."
        )


class CollectionInUseError(PointStoreError):
    """The collection that searches use can't be dropped."""

    def __init__(self, name: str, where: str) -> None:
        """Name the collection and the store."""
        super().__init__(
            f"Collection {name!r} in {where} is the one in use: it can't be dropped before another is published in "
            f"its place. Nothing was changed."
        )


class CollectionNameTakenError(PointStoreError):
    """The name that should stand for a collection is a collection itself."""

    def __init__(self, name: str, where: str) -> None:
        """Name the collection and the server."""
        super().__init__(
            f"{name!r} at {where} is a collection and no alias: another can't be put in its place. Nothing was "
            f"changed. Set EXTRACTION_COLLECTION_NAME to a new name, or remove that collection on the server."
        )


class PointsMissingError(PointStoreError):
    """The store does not hold the points that it acknowledged."""

    def __init__(self, when: str, *, expected: int, got: int, records: str) -> None:
        """Name the moment, both numbers and the records."""
        super().__init__(
            f"{got} points were found {when}, expected exactly {expected} ({records}). The rows were not marked, so "
            f"their range is tried again; 'extraction reconcile' compares the whole collection."
        )


# The demo


class DemoEncoderError(ExtractionError):
    """The installed PyAV can't encode one of the demo's clips."""

    permanent = True

    def __init__(self, filename: str, encoders: tuple[str, ...], av_version: str) -> None:
        """Name the clip, the encoders that would do and the PyAV that lacks them."""
        super().__init__(
            f"Demo clip {filename!r} can't be encoded: PyAV {av_version} has none of {', '.join(encoders)}. "
            f"Nothing was written for it. Install PyAV's own wheel: pip install --force-reinstall av."
        )


class DemoFolderError(ExtractionError):
    """The demo's folder can't be written."""

    permanent = True

    def __init__(self, path: str, why: str) -> None:
        """Name the path and the system's own words."""
        super().__init__(
            f"The demo can't write {path!r}: {why}. What was finished before stays. "
            f"Free the space or permit writing there, or set EXTRACTION_HOME to another folder, then run it again."
        )


class DemoTargetError(ExtractionError):
    """The demo was about to work on data that is not its own."""

    permanent = True

    def __init__(self, settings: tuple[str, ...], home: str) -> None:
        """Name the settings that lead out of the home folder."""
        names = ", ".join(settings)
        super().__init__(
            f"The demo writes under {home!r} only, but {names} {'leads' if len(settings) == 1 else 'lead'} elsewhere. "
            f"Nothing was written. Unset {names} in the environment and in .env, or run the demo in another folder."
        )


class EmbeddingShardError(ExtractionError):
    """A file is no embedding shard of this store, or it is damaged."""

    def __init__(self, path: str, got: str, expected: str) -> None:
        """Name the file, what it holds and what was expected."""
        super().__init__(
            f"Embedding shard {path!r} can't be read: got {got}, expected {expected}. Other shards are not touched. "
            f"Delete the file and run its range again: it is made anew from the stored frames."
        )


class QueryImageError(ExtractionError):
    """A file given to search is no image that can be embedded."""

    permanent = True

    def __init__(self, path: str, got: str, expected: str) -> None:
        """Name the file, what it is and what was expected."""
        super().__init__(f"Image {path!r} can't be searched for: got {got}, expected {expected}.")


# Decoding


class VideoOpenError(ExtractionError):
    """A file can't be opened as a video."""

    def __init__(self, video: str, why: str) -> None:
        """Name the file and what the codec library said."""
        super().__init__(
            f"Video {video!r} can't be opened: {why}. Expected a complete file in a known container (mp4, webm, ts). "
            f"Nothing was written for it; the range goes on. Fetch the file again, then retry the record."
        )


class VideoFormatError(ExtractionError):
    """A file is of a kind that is never opened: a playlist, a script, a picture."""

    permanent = True

    def __init__(self, video: str, allowed: str) -> None:
        """Name the file and the containers that are opened."""
        super().__init__(
            f"Video {video!r} is refused: its content is not one of the containers that are opened ({allowed}). "
            f"Playlists, scripts and pictures are never followed, whatever their name. Convert the file to mp4."
        )


class NoVideoStreamError(ExtractionError):
    """A file holds no moving pictures that can be decoded."""

    permanent = True

    def __init__(self, video: str, found: str) -> None:
        """Name the file and what it holds instead."""
        super().__init__(
            f"Video {video!r} has no video stream that can be decoded: found {found}, expected at least one. "
            f"Cover art does not count. Nothing was written for it; the range goes on. Replace the file."
        )


class VideoEncryptedError(ExtractionError):
    """A video is encrypted; its frames would be noise."""

    permanent = True

    def __init__(self, video: str) -> None:
        """Name the file."""
        super().__init__(
            f"Video {video!r} is encrypted: its frames would be noise. Nothing was written for it; the range goes on. "
            f"Replace it by a decrypted file."
        )


class VideoTooLargeError(ExtractionError):
    """A video's pictures have more pixels than allowed."""

    permanent = True

    def __init__(self, video: str, *, width_px: int, height_px: int, max_pixels: int) -> None:
        """Name the file, its size and the limit."""
        super().__init__(
            f"Video {video!r} is {width_px}x{height_px} ({width_px * height_px} pixels), expected at most "
            f"{max_pixels}. It was not decoded; the range goes on. Raise EXTRACTION_MAX_PIXELS if it is meant."
        )


class VideoTooLongError(ExtractionError):
    """A video is longer than allowed."""

    permanent = True

    def __init__(self, video: str, *, seconds: float, max_seconds: float) -> None:
        """Name the file, its length and the limit."""
        super().__init__(
            f"Video {video!r} lasts {seconds:.0f} s or more, expected at most {max_seconds:.0f} s. It was not decoded; "
            f"the range goes on. Raise EXTRACTION_MAX_DURATION_SECONDS if it is meant."
        )


class FramesTooManyError(ExtractionError):
    """The sampled frames of one video do not fit the memory set aside for them."""

    permanent = True

    def __init__(self, video: str, *, num_frames: int, needed_bytes: int, max_bytes: int) -> None:
        """Name the file, the frames and both sizes."""
        super().__init__(
            f"Video {video!r} would give {num_frames} frames of {needed_bytes} bytes together, expected at most "
            f"{max_bytes}. It was not decoded; the range goes on. Lower EXTRACTION_FPS, EXTRACTION_MAX_FRAMES or "
            f"EXTRACTION_SHORT_SIDE_PX, or raise EXTRACTION_DECODE_MEMORY_BYTES."
        )


class VideoDecodeError(ExtractionError):
    """No sampled frame of a video decodes."""

    def __init__(self, video: str, *, listed_frames: int, why: str) -> None:
        """Name the file, how many frames it lists and what the codec library said."""
        listed = f" of the {listed_frames} that it lists" if listed_frames else ""
        super().__init__(
            f"Video {video!r} decoded 0 frames{listed}, expected at least 1: {why}. Nothing was written for it; the "
            f"range goes on. Fetch the file again, then retry the record."
        )


class DecoderMissingError(ExtractionError):
    """The chosen decoder is not installed."""

    def __init__(self, decoder: str, why: str) -> None:
        """Name the decoder and why it can't be imported."""
        super().__init__(
            f"Decoder {decoder!r} can't be imported: {why}. Install it, or set EXTRACTION_DECODER to another one."
        )


class DecodeTimeoutError(ExtractionError):
    """A video took longer than its wall-clock limit."""

    def __init__(self, video: str, *, seconds: float) -> None:
        """Name the file and the limit."""
        super().__init__(
            f"Video {video!r} was not decoded within {seconds:g} s; its worker was stopped and replaced. Nothing was "
            f"written for it; the range goes on. Raise EXTRACTION_DECODE_TIMEOUT_SECONDS if it is just long."
        )


class DecodeMemoryError(ExtractionError):
    """A video needed more memory than a worker may use."""

    def __init__(self, video: str, *, limit_bytes: int) -> None:
        """Name the file and the limit."""
        super().__init__(
            f"Video {video!r} needs more than the {limit_bytes} bytes of memory that a worker may use. Nothing was "
            f"written for it; the range goes on. Raise EXTRACTION_DECODE_MEMORY_BYTES if it is meant."
        )


class DecodeWorkerDiedError(ExtractionError):
    """The process that decoded a video died."""

    def __init__(self, video: str, *, how: str) -> None:
        """Name the file and how the process ended."""
        super().__init__(
            f"Video {video!r} ended its worker process ({how}), which was replaced. Nothing was written for it; the "
            f"range goes on. If this repeats, the file is hostile or the machine is short of memory."
        )


class DecodeWorkerStartError(ExtractionError):
    """A decoding process can't start: no video is to blame."""

    def __init__(self, how: str, said: str) -> None:
        """Say how the process ended and its last words."""
        super().__init__(
            f"A decoding worker did not start ({how}). No record is to blame; finished shards are kept. "
            f"Its last words: {said or 'none'}."
        )


class FrameShardError(ExtractionError):
    """A frame shard can't be read back."""

    def __init__(self, path: str, why: str) -> None:
        """Name the shard and what is wrong with it."""
        super().__init__(
            f"Frame shard {path!r} can't be read: {why}. Its records are to be decoded again: remove the file and "
            f"materialize video_frames for its range."
        )


class FrameStoreError(ExtractionError):
    """Frames can't be read or written where they are kept."""

    def __init__(self, folder: str, why: str) -> None:
        """Name the place and what is wrong."""
        super().__init__(
            f"The frames in {folder!r} can't be reached: {why}. No record is to blame, and what was written is kept. "
            f"Correct EXTRACTION_FRAMES_URI, or the store's own configuration (AWS_… variables, say); then run "
            f"the range again."
        )


# Fetching


class SchemeError(ExtractionError):
    """A row's address has a scheme that is not read."""

    permanent = True

    def __init__(self, uri: str, scheme: str) -> None:
        """Name the address, its scheme and what is supported."""
        super().__init__(
            f"Address {shown_address(uri)!r} has scheme {scheme!r}, expected a path, file://, https://, s3:// or "
            f"gs://. Correct the row, or the setting EXTRACTION_SOURCE_URI_COLUMN or EXTRACTION_SOURCE_URI_TEMPLATE."
        )


class FileForbiddenError(ExtractionError):
    """A row's address points where nothing may be read, or at what is no regular file."""

    permanent = True

    def __init__(self, uri: str, why: str, *, roots: str) -> None:
        """Name the address, what is wrong with it and the folders that may be read."""
        super().__init__(
            f"Address {shown_address(uri)!r} is refused: {why}. Expected a regular file under one of {roots}. "
            f"Correct the row, or add the folder to EXTRACTION_ALLOWED_ROOTS."
        )


class FileUnavailableError(ExtractionError):
    """A row's file is missing, empty or unreadable now; it may still arrive."""

    def __init__(self, uri: str, why: str) -> None:
        """Name the address and what is wrong."""
        super().__init__(
            f"File {shown_address(uri)!r} is not available: {why}, expected a readable file with content. The record "
            f"is tried again later; the range goes on."
        )


# Search


class QueryVideoError(ExtractionError):
    """A file given to search is no video that can be embedded."""

    permanent = True

    def __init__(self, path: str, why: str) -> None:
        """Name the file and say what the decode stage said."""
        super().__init__(f"Video {path!r} can't be searched for: {why}")


class TextSearchError(ExtractionError):
    """The model has no side for texts."""

    permanent = True

    def __init__(self, model: str) -> None:
        """Name the model."""
        super().__init__(
            f"Model {model!r} embeds images only, so that a text can't be searched for. Search with --image or "
            f"--video, or choose a model that puts texts beside images as EXTRACTION_MODEL and load the collection "
            f"with it."
        )


class GalleryError(ExtractionError):
    """The gallery can't be written."""

    def __init__(self, path: str, why: str) -> None:
        """Name the file and the system's own words."""
        super().__init__(f"Gallery {path!r} can't be written: {why}. Choose another file for --html.")


# Changing the model, moving points


class CollectionNotReadyError(PointStoreError):
    """A collection that should take over lacks records."""

    def __init__(self, name: str, where: str, *, missing: int, records: int, ranges: str) -> None:
        """Name the collection, how much it lacks, and where."""
        super().__init__(
            f"Collection {name!r} in {where} can't take over yet: {missing} of {records} records that are done are "
            f"not in it, or not with all their points ({ranges}). Nothing was changed. Run 'extraction launch "
            f"FIRST-LAST' on these ranges, then publish again; --force publishes it as it is."
        )


class ExportError(ExtractionError):
    """Points can't be exported."""

    def __init__(self, path: str, why: str) -> None:
        """Name the file and what went wrong."""
        super().__init__(f"Points can't be exported to {path!r}: {why}. No file was left behind.")


class LegacyCheckpointError(ExtractionError):
    """The earlier script's checkpoint can't be imported."""

    def __init__(self, where: str, why: str) -> None:
        """Name the place and what is wrong with it."""
        super().__init__(
            f"No checkpoint was imported from {where}: {why}. Nothing was changed. Name the right file, or say where "
            f"to start with 'extraction checkpoint set ID'."
        )


# Fetching. Addresses are shown without passwords and signatures.


class AddressForbiddenError(ExtractionError):
    """A row's address leads to a server, bucket or network that may not be read."""

    permanent = True

    def __init__(self, uri: str, why: str, fix: str) -> None:
        """Name the address, what is wrong with it and the fix."""
        super().__init__(f"Address {shown_address(uri)!r} is refused: {why}. Nothing was read from it. {fix}")


class FileRefusedError(ExtractionError):
    """A server or bucket said for good that it has no such file, or not for us."""

    permanent = True

    def __init__(self, uri: str, answer: str) -> None:
        """Name the address and the answer."""
        super().__init__(
            f"File {shown_address(uri)!r} can't be had: the answer was {answer}. Nothing was written for it; the range "
            f"goes on. Correct the row or the rights, then retry the record."
        )


class FileTooLargeError(ExtractionError):
    """A file is larger than may be downloaded."""

    permanent = True

    def __init__(self, uri: str, *, got_bytes: int, max_bytes: int) -> None:
        """Name the address, its size as far as known and the limit."""
        super().__init__(
            f"File {shown_address(uri)!r} has {got_bytes} bytes or more, expected at most {max_bytes}. It was not "
            f"kept; the range goes on. Raise EXTRACTION_MAX_FILE_BYTES (and EXTRACTION_CACHE_BYTES) if it is meant."
        )


class FileEncodedError(ExtractionError):
    """A server packed a file although it was asked not to; unpacking could fill any disk."""

    permanent = True

    def __init__(self, uri: str, encoding: str) -> None:
        """Name the address and the encoding."""
        super().__init__(
            f"File {shown_address(uri)!r} comes with Content-Encoding {encoding!r}, expected the file as it is: packed "
            f"answers are never unpacked. Nothing was written for it; the range goes on. Correct the server."
        )


class DownloadTimeoutError(ExtractionError):
    """A download took longer than allowed."""

    def __init__(self, uri: str, *, seconds: float) -> None:
        """Name the address and the limit."""
        super().__init__(
            f"File {shown_address(uri)!r} did not arrive within {seconds:g} s. What arrived is kept, and the next try "
            f"goes on from there where the server allows it; the range goes on. Raise EXTRACTION_FETCH_TIMEOUT_SECONDS "
            f"if the files are large or the network slow."
        )


class FetchSetupError(ExtractionError):
    """Files can't be fetched as things are set up here: no record is to blame, so the run ends."""


class FetchExtraMissingError(FetchSetupError):
    """A bucket is to be read whose package is not installed."""

    def __init__(self, scheme: str, package: str) -> None:
        """Name the scheme, the package and the extra."""
        super().__init__(
            f"EXTRACTION_ALLOWED_BUCKETS names a {scheme}:// bucket, and the package {package} is not installed. "
            f"Nothing was read. Install the extra: pip install 'extraction-dagster[{scheme}]'."
        )


class FetchCredentialsError(FetchSetupError):
    """The credentials for a bucket are missing, expired or wrong."""

    def __init__(self, uri: str, said: str) -> None:
        """Name the address and the kind of refusal, never the credentials."""
        super().__init__(
            f"The credentials for {shown_address(uri)!r} do not do: {said}. No record is to blame, and none was "
            f"marked. Set them as the store's own tools do (AWS_… variables or ~/.aws, "
            f"GOOGLE_APPLICATION_CREDENTIALS), then run the range again."
        )


class DownloadCacheError(FetchSetupError):
    """The cache of downloads can't be used."""

    def __init__(self, folder: str, why: str) -> None:
        """Name the folder and what is wrong."""
        super().__init__(
            f"The cache of downloads in {folder!r} can't be used: {why}. No record is to blame, and none was marked. "
            f"Make room there, or change EXTRACTION_CACHE_BYTES or EXTRACTION_HOME; then run the range again."
        )


# Frames: what is kept of them, and how they leave


class FramesRejectedError(ExtractionError):
    """The quality steps left nothing of a video."""

    permanent = True

    def __init__(self, path: str, *, num_frames: int) -> None:
        """Name the file and how many frames were looked at."""
        super().__init__(
            f"Video {path!r} kept 0 of {num_frames} sampled frames, expected at least 1: all are of a single colour. "
            f"Nothing was written for it; the range goes on. Set EXTRACTION_MIN_FRAMES=1 to keep one of them, or "
            f"EXTRACTION_REJECT_SOLID=false."
        )


class FramesExportError(ExtractionError):
    """Frames can't be exported."""

    def __init__(self, path: str, why: str, *, survives: str) -> None:
        """Name the place, what went wrong and what is there now."""
        super().__init__(f"Frames can't be exported to {path!r}: {why}. {survives}")


# Runs: their options, and what they can't do


class RunOptionError(ExtractionError):
    """An option in a run's config is wrong, or would change nothing."""

    permanent = True

    def __init__(self, name: str, got: str, expected: str) -> None:
        """Name the option, what was got and what was expected."""
        super().__init__(
            f"Run option {name} is {got}, expected {expected}. Nothing was started. Correct it in the run's config, "
            f"under resources: extraction: config; what is left out is as the settings say."
        )


class OtherModelError(ExtractionError):
    """A run was given another model than the settings, and no collection waits for its vectors."""

    permanent = True

    def __init__(self, options: str, *, fingerprint: str, collection: str, there: str, environment: str) -> None:
        """Name the run's options, what they give, the collection's name, what is there, and the settings that stage."""
        super().__init__(
            f"The run's config ({options}) gives vectors of fingerprint {fingerprint}, and no collection "
            f"{collection!r} takes them (there: {there}). Nothing was started: vectors of two models never mix. "
            f"Run '{environment} extraction collection stage' first, or leave the model out."
        )


class FramesMissingError(ExtractionError):
    """Records are to be embedded anew, and their frames are not stored."""

    permanent = True

    def __init__(self, key: str, record_ids: list[int]) -> None:
        """Name the range and the records."""
        super().__init__(
            f"Range {key}: {len(record_ids)} records have no stored frames of these settings ({_some(record_ids)}). "
            f"The others were embedded; what these had stays. Launch extraction_job on the range: it decodes."
        )


class VectorsMissingError(ExtractionError):
    """Records are to be indexed anew, and their vectors are not stored."""

    permanent = True

    def __init__(self, key: str, record_ids: list[int]) -> None:
        """Name the range and the records."""
        super().__init__(
            f"Range {key}: {len(record_ids)} records have no stored vectors of these settings ({_some(record_ids)}). "
            f"The others were indexed; what these had stays. Launch embedding_job on the range: it embeds."
        )


def _some(record_ids: list[int]) -> str:
    shown = ", ".join(map(str, record_ids[:5]))
    return f"records {shown}{', …' if len(record_ids) > 5 else ''}"  # noqa: PLR2004 - as many as shown


class PointsChangedError(PointStoreError):
    """Points that were verified when their rows were marked are not what is there at the end of the same run."""

    def __init__(self, key: str, *, lost: int, surplus: int, record_ids: list[int]) -> None:
        """Name the range, the points and the records."""
        super().__init__(
            f"Range {key}: {lost} verified points are gone and {surplus} are too many ({_some(record_ids)}): something "
            f"else writes into the collection. These records were made pending, so their range is run again; "
            f"'extraction reconcile' compares the whole collection."
        )


# Backfills


_MOST_RANGES = 5  # named in one sentence


class BackfillUnknownError(ExtractionError):
    """A backfill was named that there is not."""

    def __init__(self, backfill_id: str, why: str) -> None:
        """Name the backfill and say what is wrong."""
        super().__init__(
            f"No backfill {backfill_id!r} can be shown or cancelled: {why}. Nothing was changed. Runs > Backfills in "
            f"the UI lists them."
        )


class DaemonMissingError(ExtractionError):
    """A command would wait for runs that nobody starts."""

    def __init__(self) -> None:
        """Say how to start one, and what works without."""
        super().__init__(
            "No Dagster daemon is running, which would start the runs: nothing was launched. Start it in the folder of "
            "workspace.yaml with 'dagster dev -w workspace.yaml' (or 'dagster-daemon run -w workspace.yaml'), leave "
            "out --wait, or process the ranges in this process with --here."
        )


class BackfillFailedError(ExtractionError):
    """A backfill has ended, and not all of its ranges are done."""

    def __init__(self, what: str, ranges: list[str], *, total: int, finished: int, reason: str = "") -> None:
        """Name the backfill, the ranges that failed, and why the first of them did, as far as known."""
        more = f" and {len(ranges) - _MOST_RANGES} more" if len(ranges) > _MOST_RANGES else ""
        failed = f", {len(ranges)} failed ({', '.join(ranges[:_MOST_RANGES])}{more})" if ranges else ""
        why = f"{reason.rstrip('. ')}. " if reason else ""
        super().__init__(
            f"{what}: {finished} of {total} ranges are done{failed}. {why}What was finished is kept: the same command "
            f"goes on from there, with --stale-only on what is missing alone."
        )


# Compiling a model. None of these ends a run: the model runs as it is, and the sentence is a warning.


class CompileError(ExtractionError):
    """A model can't be compiled."""

    def __init__(self, model: str, why: str, fix: str) -> None:
        """Name the model, why it can't be, and the fix."""
        self.why = why
        super().__init__(
            f"Model {model!r} runs uncompiled: {why}. Its vectors are the same, at more CPU time a frame. {fix} "
            f"EXTRACTION_COMPILE=off ends this message."
        )


class ArtifactFolderError(ExtractionError):
    """A compiled network could have been written by somebody else, or its folder can't be used."""

    def __init__(self, path: str, why: str) -> None:
        """Name the file or folder and what is wrong with it."""
        super().__init__(
            f"No compiled model is loaded out of {path}: {why}, expected what this user alone can write. The model "
            f"runs uncompiled, with the same vectors. Remove it, or choose another EXTRACTION_HOME."
        )


class CompiledNetworkError(ExtractionError):
    """A compiled network can't be loaded or does not do."""

    def __init__(self, path: str, why: str) -> None:
        """Name the file and what is wrong with it."""
        self.why = why
        super().__init__(f"The compiled network {path} can't be used: {why}. The model runs uncompiled.")


# Metrics


class MetricsAddressError(ExtractionError):
    """The metrics can't be served at an address."""

    def __init__(self, address: str, why: str) -> None:
        """Name the address and the system's own words."""
        super().__init__(
            f"Metrics can't be served at {address}: {why}. Choose another one, for example --serve 127.0.0.1:9464."
        )


class MetricsFileError(ExtractionError):
    """The metrics can't be written to a file."""

    def __init__(self, path: str, why: str) -> None:
        """Name the file and the system's own words."""
        super().__init__(
            f"Metrics can't be written to {path!r}: {why}. The file before, if any, is as it was. Choose a file in a "
            f"folder that is there and may be written."
        )


# Notices


class NoticeError(ExtractionError):
    """A notice did not reach anybody; the address, which may be a secret, is not named."""

    def __init__(self, why: str) -> None:
        """Say why."""
        self.why = why
        super().__init__(
            f"A notice was not delivered: {why}. Nothing else is affected. Correct EXTRACTION_NOTIFY and "
            f"EXTRACTION_NOTIFY_URL, then try it with 'extraction notify'."
        )


class NotifierError(ExtractionError):
    """EXTRACTION_NOTIFY names a function that can't be used."""

    def __init__(self, path: str, why: str) -> None:
        """Name the function and what is wrong with it."""
        super().__init__(
            f"Setting EXTRACTION_NOTIFY is {path!r}: {why}. Nobody is told of failed runs. Expected none, log, "
            f"webhook, slack, or module:function of a function that takes one RunFailure."
        )
