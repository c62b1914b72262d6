"""Every setting: its name, default, description and check. This is their only home.

Each field `name` is read from the environment as `EXTRACTION_NAME`, or from a `.env` file in the working directory.
`docs/settings.md` is generated from this file; a test holds the two equal. Long because it is one table of
every setting, under headings in the order of the data's way.
"""

from __future__ import annotations

import difflib
import ipaddress
import logging
import os
import re
import urllib.parse
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from extraction_dagster.errors import SettingsError
from extraction_dagster.media import COMMON_CODECS
from extraction_dagster.permissions import dotenv_warning, home_warning

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic.fields import FieldInfo

_log = logging.getLogger(__name__)
PREFIX = "EXTRACTION_"
_TEST_PREFIX = "EXTRACTION_TEST_"
_NONE_WHEN_EMPTY = (
    "source_platform_column",
    "source_code_column",
    "source_extracted_column",
    "source_embedded_column",
)
# The columns of a point's payload that every point has; a column of the table can't take their place.
RESERVED_PAYLOAD_KEYS = (
    "record_id",
    "platform",
    "video_code",
    "frame_number",
    "frame_second",
    "path",
    "created_at",
    "generation",
)
# Settings, and values of settings, that were taken out in this release, and what holds now. Each is warned of once in a
# process; the next release refuses the name or value as it does any other that it doesn't know.
RETIRED: Final = {
    "compile=on": "runs as off, with the same vectors; onnxruntime compiles without a C++ compiler",
    "cache_seconds": "downloads that were unused for 7 days are removed from the cache",
    "fetch_attempts": "a download is tried 4 times before its record fails",
    "fetch_stall_seconds": "a connection that is silent for 30 s is given up and tried again",
    "shard_seconds": "a frame shard is written after 5 s of decoding",
    "vector_dtype": "a new collection keeps vectors as float16, as the embedding shards do; one that exists is kept",
}
_warned: set[str] = set()
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?"
# A host or an IPv6 address in brackets; after '*.' at least two labels; a port if it is not the scheme's own.
_HOST = re.compile(rf"(?:\*\.{_LABEL}\.)?{_LABEL}(?:\.{_LABEL})*(?::\d{{1,5}})?|\[[0-9A-Fa-f:]+\](?::\d{{1,5}})?")
_BUCKET = re.compile(r"(?:s3|gs)://[A-Za-z0-9][A-Za-z0-9._-]{1,221}(?:/[^\s,*?]*)?")
_SHORTEST_PREFIX = 8
_LONGEST_LINE = 8192
_NEARLY = 0.8  # of two names that are nearly the same
_SERVICE = "_SERVICE_HOST"  # by these variables, a Service of Kubernetes is told from a slip in a setting
_INJECTED = re.compile(r"SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?")
_NOTIFIERS = ("none", "log", "webhook", "slack")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_OWNER = re.compile(r"team:[A-Za-z0-9_.-]{1,100}|[A-Za-z0-9_.+-]{1,100}@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+")
# A quantity of Kubernetes: cores or thousandths of one; bytes with a unit, since a bare number is a slip more often.
_CPU = re.compile(r"(?!0*\.?0*$)\d{1,4}(?:\.\d{1,3})?|[1-9]\d{0,6}m")
_MEMORY = re.compile(r"[1-9]\d{0,6}(?:\.\d{1,3})?(?:[KMGT]i|[kMGT])")
_OBJECT_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_LABEL_NAME = r"[A-Za-z0-9](?:[-\w.]{0,61}[A-Za-z0-9])?"
_LabelKey = Annotated[str, Field(pattern=rf"^(?:[a-z0-9](?:[-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_LABEL_NAME}$")]
_LabelValue = Annotated[str, Field(pattern=rf"^(?:{_LABEL_NAME})?$")]


class _Toleration(BaseModel):
    """A toleration, by the names and rules of Kubernetes' API."""

    model_config = ConfigDict(extra="forbid", strict=True)

    key: _LabelKey | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: _LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: int | None = None  # noqa: N815 - Kubernetes' name

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        exists = self.operator == "Exists"
        if (exists and self.value) or (self.key is None and not exists):
            raise ValueError("Exists has no value, and all keys are meant by Exists alone")
        if self.tolerationSeconds is not None and self.effect != "NoExecute":
            raise ValueError("tolerationSeconds belongs to NoExecute")
        return self


def _like(pattern: re.Pattern[str], examples: str) -> AfterValidator:
    """Refuse a text that the pattern does not match as a whole."""

    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(examples)
        return value

    return AfterValidator(check)


def _json_like(kind: Any, example: str) -> AfterValidator:  # noqa: ANN401 - a type, in pydantic's sense
    """Refuse a text that is no JSON of this kind; what passes is kept as the text that it is."""

    def check(value: str) -> str:
        try:
            TypeAdapter(kind).validate_json(value)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"JSON such as {example} ({f'{where}: ' if where else ''}{first['msg']})") from None
        return value

    return AfterValidator(check)


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _each(pattern: re.Pattern[str], examples: str) -> AfterValidator:
    """Refuse a list that has a part which the pattern does not match."""

    def check(value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [part for part in value if not pattern.fullmatch(part)]:
            raise ValueError(f"{examples} (refused: {wrong[0]})")
        return value

    return AfterValidator(check)


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Hosts = Annotated[
    Names,
    _each(_HOST, "hosts such as media.example.com, *.cdn.example.com or media.example.com:8443"),
    AfterValidator(lambda hosts: tuple(host.lower() for host in hosts)),
]
Buckets = Annotated[Names, _each(_BUCKET, "buckets such as s3://videos, s3://videos/2026 or gs://videos")]
Owners = Annotated[Names, _each(_OWNER, "owners such as team:video or someone@example.com")]


class Settings(BaseSettings):
    """Every setting of the project, validated, immutable."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    # Where things live
    home: Path = Field(
        Path(".extraction"),
        description="Data folder for everything that runs embedded: source and state on SQLite, Dagster's storage, "
        "frames, embeddings, points.",
    )
    postgres_url: SecretStr | None = Field(
        None, description="PostgreSQL for Dagster's own storage (runs, events, cursors); SQLite under home when unset."
    )
    state_url: SecretStr | None = Field(
        None, description="Database of the ledger, errors, requests and checkpoint tables; the source's when unset."
    )
    state_schema: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$",
        description="Schema of these tables, on PostgreSQL; one for each source table of a database. The database's "
        "default when unset; made where it is missing.",
    )
    frames_uri: str | None = Field(
        None,
        description="Where frame shards are kept: any fsspec path, for example s3://bucket/frames; home/frames when "
        "unset.",
    )
    embeddings_uri: str | None = Field(
        None, description="Where embedding shards are kept, any fsspec path; home/embeddings when unset."
    )

    # The source table
    source_url: SecretStr | None = Field(
        None, description="Database of the videos table, as a SQLAlchemy URL; home/source.db (SQLite) when unset."
    )
    source_schema: str | None = Field(
        None, description="Schema of the videos table; the database's default when unset."
    )
    source_table: str = Field("insta_content", min_length=1, description="Name of the videos table.")
    source_id_column: str = Field("id", min_length=1, description="Integer column that identifies a record.")
    source_uri_column: str = Field("path", min_length=1, description="Column that says where the file lies.")
    source_uri_template: str | None = Field(
        None,
        description="Where the file lies, built from columns, for example s3://bucket/{platform}/{code}/video.mp4; "
        "used instead of source_uri_column.",
    )
    source_platform_column: str | None = Field("platform", description="Column of the platform; empty for none.")
    source_code_column: str | None = Field("code", description="Column of the video's code; empty for none.")
    source_payload_columns: Names = Field(
        (), description="Further columns that are copied into each point's payload, separated by commas."
    )
    source_predicate: str | None = Field(
        None, description="Which rows are eligible, over the table's columns: is_downloaded AND NOT is_removed."
    )
    source_version_column: str | None = Field(
        None, description="Column whose value changes whenever the file changes (updated_at, an etag)."
    )
    source_version_grows: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether a changed row's version is greater than all before it, so that changes are found at once: "
        "auto (it is a time or a number, and an index begins with it), on, off. 'extraction doctor' says what holds.",
    )
    source_version_overlap_seconds: float = Field(
        600.0,
        ge=0,
        le=7 * 86_400,
        description="How much older than the newest version, a time, that of a row may be that commits later, and is "
        "found before the round comes to it; where versions are numbers, the newest 10,000 rows are looked at again.",
    )
    source_extracted_column: str | None = Field(
        "is_extracted", description="Boolean column set once a record's frames are stored; empty for none."
    )
    source_embedded_column: str | None = Field(
        "is_embedded", description="Boolean column set once a record's points are verified; empty for none."
    )
    address_changes: Literal["process", "report"] = Field(
        "process",
        description="What becomes of a record that is done and whose file's address has changed since (another path, "
        "column, template or first root): process decodes it again, report leaves it and lets reconcile name it. "
        "Failed records are tried at once either way.",
    )
    max_label_bytes: int = Field(
        1024,
        ge=16,
        le=2**20,
        description="Longest platform, code and version of a row, in bytes of UTF-8; a record with a longer one fails.",
    )
    max_payload_bytes: int = Field(
        16 * 1024,
        ge=256,
        le=2**20,
        description="Most bytes of a record's further payload columns, together and as JSON; a record with more fails.",
    )
    max_address_bytes: int = Field(
        8 * 1024,
        ge=64,
        le=2**20,
        description="Longest address of a file, in bytes of UTF-8; a record with a longer one fails.",
    )
    source_read_only: bool = Field(
        default=False, description="Never write to the source table: the ledger alone says what is done."
    )

    # Ranges and retries
    batch_size: int = Field(1000, ge=1, le=100_000, description="Records per ID range, hence per run.")
    max_attempts: int = Field(3, ge=1, le=100, description="Tries of a failing record before it is parked.")
    keep_errors_days: int = Field(
        90,
        ge=1,
        le=36_500,
        description="Days for which the errors table keeps what is over; the last error of a record that is failed or "
        "parked stays.",
    )
    retry_delay_seconds: float = Field(
        60.0, ge=0, le=86_400, description="Wait before a failed record's second try; doubles at each further try."
    )

    # The sensor and the checkpoint
    max_in_flight: int = Field(4, ge=1, le=1000, description="Most ranges that the sensor keeps active at once.")
    max_wait_seconds: float = Field(
        30.0, ge=0, le=86_400, description="Longest wait of a row for its range to fill, before the range is requested."
    )
    run_retry_delay_seconds: float = Field(
        30.0,
        ge=0,
        le=3600,
        description="Wait before a range whose run failed is requested again; doubles at each further failure, up to "
        "an hour.",
    )
    sensor_interval_seconds: int = Field(10, ge=1, le=3600, description="Time between two ticks of the sensor.")
    sweep_every_ticks: int = Field(
        30, ge=1, le=10_000, description="Each so many ticks, rows below the watermark are looked through as well."
    )
    dead_after_seconds: int = Field(
        300,
        ge=30,
        le=86_400,
        description="A run of another machine or container that gave no sign of life for so long is taken for dead, "
        "and its range asked for again; one of this machine is seen at once.",
    )
    max_run_seconds: int = Field(
        6 * 3600, ge=10, description="A run that takes longer is ended, so that its range can be asked for again."
    )
    checkpoint_mirror: Literal["none", "json", "table"] = Field(
        "none", description="Where the watermark is copied to: none, json (checkpoint_path) or table."
    )
    checkpoint_path: Path | None = Field(None, description="The JSON mirror; home/.checkpoint when unset.")

    # Pods of runs, on Kubernetes
    run_cpu: Annotated[str, _like(_CPU, "cores such as 4, 1.5 or 500m")] | None = Field(
        None,
        description="Cores of the pod of each run, requested and limited, under K8sRunLauncher: 4, 1.5, 500m; "
        "as the launcher says when unset, like each setting of this section.",
    )
    run_memory: Annotated[str, _like(_MEMORY, "bytes with their unit, such as 8Gi or 512Mi")] | None = Field(
        None, description="Memory of the pod of each run, requested and limited: 8Gi, 512Mi."
    )
    run_gpus: int | None = Field(
        None, ge=1, le=64, description="GPUs (nvidia.com/gpu) of the pods of jobs that embed; other jobs ask for none."
    )
    run_node_selector: Annotated[str, _json_like(dict[_LabelKey, _LabelValue], '{"pool": "gpu"}')] | None = Field(
        None,
        description='Labels of the nodes on which jobs that embed run, as JSON: {"pool": "gpu"}.',
    )
    run_tolerations: (
        Annotated[str, _json_like(list[_Toleration], '[{"key": "nvidia.com/gpu", "operator": "Exists"}]')] | None
    ) = Field(
        None,
        description='Taints that the pods of jobs that embed tolerate, as JSON: [{"key": "nvidia.com/gpu", "operator": '
        '"Exists", "effect": "NoSchedule"}].',
    )
    run_queue: Annotated[str, _like(_OBJECT_NAME, "the name of a LocalQueue, such as extraction")] | None = Field(
        None, description="Kueue's LocalQueue in which the job of each run waits (label kueue.x-k8s.io/queue-name)."
    )

    # Fetching
    allowed_roots: Names = Field(
        (), description="Folders from which files may be read, separated by commas; home/videos when unset."
    )
    allowed_hosts: Hosts = Field(
        (),
        description="Servers from which https:// files may be read, separated by commas: media.example.com, "
        "*.cdn.example.com, media.example.com:8443; none when unset.",
    )
    allowed_buckets: Buckets = Field(
        (),
        description="Buckets from which files may be read, separated by commas, each with the folder that all of its "
        "files lie in, if they do: s3://videos,gs://videos/2026; none when unset.",
    )
    allowed_networks: Names = Field(
        (),
        description="Private networks in which an allowed host may lie, separated by commas: "
        "media.example.com=10.1.0.0/16 for one host, 10.1.0.0/16 for every one; without them only public addresses are "
        "connected to.",
    )
    allow_http: bool = Field(default=False, description="Read http:// addresses of allowed hosts too, unencrypted.")
    max_file_bytes: int = Field(4 * 2**30, ge=1, description="Largest file that is downloaded.")
    fetch_timeout_seconds: float = Field(
        600.0, gt=0, le=86_400, description="Wall-clock limit for the download of one file, all its tries together."
    )
    fetch_threads: int = Field(
        4, ge=1, le=64, description="Files that are downloaded at once, ahead of the decoding processes."
    )
    cache_bytes: int = Field(
        20 * 2**30,
        ge=2**20,
        description="Size that the cache of downloads, home/cache/videos, never exceeds; a larger file is refused.",
    )

    # Sampling: which frames of a video
    sampling: Literal["fps", "uniform", "keyframes", "scene"] = Field(
        "fps",
        description="How frames are chosen from a video: fps, uniform (num_frames of them), keyframes (the cheapest), "
        "or scene (keyframes that differ from the one before).",
    )
    fps: float = Field(1.0, gt=0, le=240, description="Frames per second of video, for sampling=fps.")
    max_frames: int = Field(
        600, ge=1, le=100_000, description="Most frames of one video; all but sampling=uniform is thinned out to fit."
    )
    num_frames: int = Field(16, ge=1, le=10_000, description="Frames per video, for sampling=uniform.")
    min_frames: int = Field(
        1,
        ge=0,
        le=10_000,
        description="Fewest frames of one video, as far as it has them: a choice of fewer is filled up evenly, and "
        "what reject_solid, drop_duplicates and sampling=scene leave out comes back. With 0 a video of which "
        "nothing is left is an error.",
    )
    scene_distance: float = Field(
        0.3,
        gt=0,
        le=1,
        description="Share of a picture's pixels whose colour must differ for a new scene, for sampling=scene.",
    )
    reject_solid: bool = Field(default=False, description="Leave out frames of a single colour, black for example.")
    solid_deviation: float = Field(
        6.0,
        gt=0,
        le=64,
        description="Standard deviation, of 255, that every colour channel of a solid frame stays below.",
    )
    crop_bars: bool = Field(
        default=False,
        description="Cut off black bars above, below and beside the picture; one crop for a whole video.",
    )
    drop_duplicates: bool = Field(
        default=False, description="Leave out frames that look like an earlier kept frame of the same video."
    )
    duplicate_bits: int = Field(
        6, ge=0, le=32, description="Most bits of 64 in which the dHash of duplicates differs, for drop_duplicates."
    )

    # Decoding
    decoder: Literal["pyav", "decord"] = Field("pyav", description="Decoder: pyav (exact, faster) or decord.")
    video_codecs: Names = Field(
        COMMON_CODECS,
        description="Decoders of FFmpeg, by its names, that may be opened, separated by commas. The rare ones, which "
        "fewer eyes have looked at, are not among them: add those that your videos need.",
    )
    decode_workers: int = Field(
        default_factory=lambda: os.cpu_count() or 1, ge=1, le=256, description="Decoding processes; the cores if unset."
    )
    decode_timeout_seconds: float = Field(300.0, gt=0, le=86_400, description="Wall-clock limit for one video.")
    decode_memory_bytes: int = Field(
        4 * 2**30, ge=2**28, description="Address space that a decoding process may use beyond its own start."
    )
    require_confinement: bool = Field(
        default=False,
        description="Decode nothing unless the kernel confines a decoding process in every way that docs/security.md "
        "lists; otherwise what it lacks is logged, and the rest holds.",
    )
    max_pixels: int = Field(
        8192 * 4320, ge=1, description="Most pixels of one source frame; a larger video is refused before decoding."
    )
    max_duration_seconds: float = Field(6 * 3600.0, gt=0, description="Longest video that is decoded.")

    tone_map: Literal["on", "off"] = Field(
        "on",
        description="on: HDR (PQ, HLG) is shown as SDR, white at 203 cd/m2, saturation kept; off: its signal is stored "
        "as it is, and looks pale. SDR is the same with both.",
    )

    # Stored frames
    short_side_px: int = Field(224, ge=16, le=4320, description="Short side of a stored frame; never scaled up.")
    jpeg_quality: int = Field(95, ge=30, le=100, description="Quality of a stored frame's JPEG.")
    shard_records: int = Field(64, ge=1, le=10_000, description="Most videos in one frame shard.")
    keep_frames: str = Field(
        "all",
        pattern=r"^(all|none|[1-9][0-9]{0,4})$",
        description="How long frame shards stay once every record in them is done: all (for ever), none, or a number "
        "of days after they were written. Without them another model needs the videos again, and galleries have no "
        "thumbnails.",
    )

    # Embedding
    model: str = Field(
        "efficientnet-lite0",
        min_length=1,
        description="Embedding model: the packaged one; a folder saved by transformers, written ./folder or /folder; "
        "or organisation/name@commit of the Hugging Face hub, all 40 digits of the commit. CLIP, SigLIP, SigLIP 2 "
        "(fixed resolution) and DINOv2, as safetensors.",
    )
    trust_remote_code: Names = Field(
        (),
        description="Models, named as in EXTRACTION_MODEL and separated by commas, whose own Python code may run; none "
        "by default, and such a model is refused.",
    )
    embedding_dim: int | None = Field(
        None,
        ge=1,
        description="Keep only so many leading numbers of each vector, for a model that was trained for it "
        "(Matryoshka); all when unset.",
    )
    embed_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="Type in which the model computes, by autocast; the shorter ones pay on a GPU only. Vectors of "
        "different types are kept apart.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto, cpu, cuda, cuda:N or mps. auto is a CUDA device that no other process of this project uses, "
        "else the CPU.",
    )
    resize_on: Literal["cpu", "device"] = Field(
        "cpu",
        description="Where frames are resized for the model: cpu, or the model's device, which spares the CPU where "
        "that is a GPU. Vectors of the two differ a little and are kept apart.",
    )
    compile: Literal["off", "onnxruntime"] = Field(
        "off",
        description="onnxruntime: compile the model once for ONNX Runtime on the CPU, which needs the extra of that "
        "name, and keep the result in home/cache/compiled; vectors stay what they are.",
    )
    embed_batch_size: int | None = Field(
        None, ge=1, le=4096, description="Frames per forward pass; 8, and 128 on a GPU, when unset."
    )
    embed_readers: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Threads that read and resize frames ahead of the model; one, and on a GPU one per core up to 8, "
        "when unset.",
    )
    embed_threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Threads of a forward pass on the CPU; the cores this process may use (affinity and container "
        "limit) when unset.",
    )

    # The collection
    qdrant_url: str | None = Field(None, description="Qdrant server; the embedded engine under home when unset.")
    qdrant_grpc_port: int = Field(6334, ge=1, le=65535, description="The Qdrant server's gRPC port.")
    qdrant_api_key: SecretStr | None = Field(None, description="API key of the Qdrant server.")
    qdrant_allow_http: bool = Field(
        default=False, description="Send the key unencrypted, to http:// addresses of other machines too."
    )
    qdrant_timeout_seconds: float = Field(60.0, gt=0, le=3600, description="Limit for one call to the Qdrant server.")
    qdrant_retry_seconds: float = Field(
        300.0,
        ge=0,
        le=86_400,
        description="How long a run repeats a call while the Qdrant server is away, restarts or is too busy.",
    )
    collection_name: str = Field(
        "video_frames", pattern=r"^[A-Za-z0-9_\-]{1,200}$", description="Name of the collection."
    )
    quantization: Literal["none", "scalar"] = Field(
        "none",
        description="scalar: a new collection keeps an int8 copy of its vectors as well, which is searched first.",
    )
    vectors_on_disk: bool = Field(
        default=False, description="A new collection reads its vectors from disk: less memory, slower searches."
    )
    reconcile_cron: str = Field(
        "0 4 * * *",
        pattern=r"^\S+ \S+ \S+ \S+ \S+$",
        description="When reconcile_schedule compares the collection with the table and repairs it, as a cron line in "
        "UTC; the schedule is off until it is switched on in the UI.",
    )
    purge_after_seconds: float = Field(
        3600.0,
        ge=0,
        le=2_592_000,
        description="Points of deleted rows are removed by a reconciliation that finds the rows gone so long after an "
        "earlier one did; 0: at once.",
    )
    purge_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="The share of all known records above which a reconciliation removes none that is gone, but for "
        "'extraction reconcile --repair --force'; ten records, or half of them, are always allowed. 0: none without "
        "--force.",
    )

    # What Dagster shows
    owners: Owners = Field(
        ("team:extraction",),
        description="Owners of the assets, separated by commas: team:names or e-mail addresses.",
    )
    contact_sheet_frames: int = Field(
        12,
        ge=0,
        le=24,
        description="Thumbnails that each materialization of video_frames keeps in Dagster's storage, for its contact "
        "sheet; 0 for none.",
    )
    max_failure_rate: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of a range's records that may be failed or parked before the check failure_rate warns.",
    )
    keep_runs: str = Field(
        "90",
        pattern=r"^(all|[1-9][0-9]{0,4}[hd]?)$",
        description="How long Dagster's ended runs and their events stay: a number of days, of hours (12h), or all. "
        "What the partitions page shows stays in any case: the newest materialization of each range, and the failed "
        "run of one that has none since.",
    )
    progress_interval_seconds: int = Field(
        300,
        ge=30,
        le=86_400,
        description="Time between two looks of progress_sensor, which charts extraction_progress.",
    )
    stuck_seconds: int = Field(
        3600,
        ge=600,
        le=30 * 86_400,
        description="Rows are due, and none was finished for so long: the check watermark_moves fails, and "
        "extraction_progress counts as overdue.",
    )

    # Notices
    notify: str = Field(
        "none",
        description="Who is told of failed runs: none; log; webhook (a JSON document is posted to notify_url); slack "
        "(a text, for Slack and what takes its messages); or module:function, which is called with a RunFailure.",
    )
    notify_url: SecretStr | None = Field(
        None, description="Where notices are posted to, for notify=webhook and slack; https, or http on this machine."
    )
    notify_allow_http: bool = Field(
        default=False, description="Post notices to http:// addresses of other machines too, unencrypted."
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, values: dict[str, object]) -> dict[str, object]:
        """Let the default apply to an empty value, but for the columns whose emptiness means none."""
        empty: dict[str, None] = {name: None for name in _NONE_WHEN_EMPTY if values.get(name) == ""}
        return {name: value for name, value in values.items() if value != ""} | empty

    @field_validator("compile", mode="before")
    @classmethod
    def _no_retired_value(cls, value: object) -> object:
        if value != "on":
            return value
        _warn_of_retired("compile=on")
        return "off"

    @field_validator("source_payload_columns", mode="after")
    @classmethod
    def _no_reserved_column(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if taken := sorted({*value} & {*RESERVED_PAYLOAD_KEYS}):
            every = ", ".join(RESERVED_PAYLOAD_KEYS)
            raise ValueError(f"columns other than {every}, which every point has (refused: {', '.join(taken)})")
        return value

    @field_validator("allowed_networks", mode="after")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            host, equals, named = text.rpartition("=")
            try:
                network = ipaddress.ip_network(named)
            except ValueError:
                network = None
            is_host = not equals or (_HOST.fullmatch(host) is not None and "[" not in host)
            if network is None or network.prefixlen < _SHORTEST_PREFIX or not is_host:
                examples = "10.1.0.0/16, fd00:1::/64 or media.example.com=10.1.0.0/16"
                raise ValueError(f"networks such as {examples}, none larger than a /8 (refused: {text})")
        return tuple(text.lower() for text in value)

    @field_validator("frames_uri", "embeddings_uri", mode="after")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        for part in (value or "").split("://")[1:]:
            user, at, _ = part.partition("/")[0].rpartition("@")
            if at and ":" in user:
                message = "an address without a password: it belongs into the store's own configuration (AWS_…, say)"
                raise ValueError(message)
        return value

    @field_validator("qdrant_url", mode="after")
    @classmethod
    def _plain_server_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urllib.parse.urlsplit(value)
        except ValueError:
            raise ValueError("an address such as http://localhost:6333") from None
        if "@" in parts.netloc or parts.query or parts.fragment:
            message = "an address without user, password or query: the key belongs into EXTRACTION_QDRANT_API_KEY"
            raise ValueError(message)
        try:
            is_usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:  # of a port that is none; the library's words would quote it
            is_usable = False
        if not is_usable:
            raise ValueError("an address such as http://localhost:6333 or https://qdrant.example.com:6333")
        return value

    @field_validator("notify", mode="after")
    @classmethod
    def _known_notifier(cls, value: str) -> str:
        if value not in _NOTIFIERS and not _FUNCTION.fullmatch(value):
            raise ValueError(f"{', '.join(_NOTIFIERS)}, or module:function")
        return value

    @field_validator("notify_url", mode="after")
    @classmethod
    def _usable_address(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and _split_address(value.get_secret_value()) is None:
            raise ValueError("an address such as https://hooks.example.com/services/…, without user and password")
        return value

    @field_validator("home", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.source_read_only and self.state_url is None:
            message = "source_read_only needs state_url: the ledger can't be kept in a database that is never written"
            raise ValueError(message)
        if self.state_schema is not None and self.resolved_state_url.startswith("sqlite"):
            raise ValueError(
                "state_schema needs PostgreSQL for the state (source_url or state_url): SQLite has no schemas"
            )
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames ({self.min_frames}) must not be greater than max_frames ({self.max_frames})")
        return self

    @model_validator(mode="after")
    def _key_is_encrypted(self) -> Self:
        if self.qdrant_api_key is None or self.qdrant_url is None or self.qdrant_allow_http:
            return self
        parts = urllib.parse.urlsplit(self.qdrant_url)
        if parts.scheme == "http" and not _is_this_machine(parts.hostname or ""):
            message = "qdrant_url must be https where there is a qdrant_api_key, unless it leads to this machine or "
            raise ValueError(f"{message}qdrant_allow_http is true: the key would be sent unencrypted")
        return self

    @model_validator(mode="after")
    def _notices_have_an_address(self) -> Self:
        if self.notify not in {"webhook", "slack"}:
            return self
        parts = _split_address(self.notify_url.get_secret_value()) if self.notify_url else None
        if parts is None:
            raise ValueError(f"notify={self.notify} needs notify_url")
        if parts.scheme == "http" and not self.notify_allow_http and not _is_this_machine(parts.hostname or ""):
            raise ValueError("notify_url must be https, unless it leads to this machine or notify_allow_http is true")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments before the environment before `.env`; of both, only the variables that are set."""
        del file_secret_settings  # there is no folder of secrets
        named = [
            _SetVariables(settings_cls, source.env_vars)
            for source in (env_settings, dotenv_settings)
            if isinstance(source, EnvSettingsSource)
        ]
        return init_settings, *named

    @property
    def resolved_source_url(self) -> str:
        """The source's SQLAlchemy URL, default applied; holds the password: never print it."""
        return self.source_url.get_secret_value() if self.source_url else f"sqlite:///{self.home / 'source.db'}"

    @property
    def source_kind(self) -> str:
        """The source's kind of database, as the beginning of its URL says it: postgresql, sqlite."""
        found = re.match(r"[A-Za-z0-9]{1,32}", self.resolved_source_url)
        return found[0].lower() if found else "sql"

    @property
    def resolved_state_url(self) -> str:
        """The state's SQLAlchemy URL, default applied; holds the password: never print it."""
        return self.state_url.get_secret_value() if self.state_url else self.resolved_source_url

    @property
    def runs_kept_for(self) -> timedelta | None:
        """How long runs of Dagster stay; None for ever."""
        if self.keep_runs == "all":
            return None
        number = int(self.keep_runs.rstrip("hd"))
        return timedelta(hours=number) if self.keep_runs.endswith("h") else timedelta(days=number)

    @property
    def resolved_frames_uri(self) -> str:
        """Where frame shards are kept, default applied."""
        return self.frames_uri or str(self.home / "frames")

    @property
    def resolved_embeddings_uri(self) -> str:
        """Where embedding shards are kept, default applied."""
        return self.embeddings_uri or str(self.home / "embeddings")

    @property
    def resolved_allowed_roots(self) -> tuple[Path, ...]:
        """Folders from which files may be read, default applied."""
        return tuple(Path(root).expanduser().absolute() for root in self.allowed_roots) or (self.home / "videos",)


class _SetVariables(PydanticBaseSettingsSource):
    """The settings that a set of variables gives.

    The library's own source asks for each field in turn and examines its type each time: 3 ms of CPU, two sources for
    each look at the settings. No field here is a structure, so a variable's text is the value to check.
    """

    def __init__(self, settings_cls: type[BaseSettings], variables: Mapping[str, str | None]) -> None:
        super().__init__(settings_cls)
        self._variables = variables

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        """The variable's text; None where it is not set."""
        value = self._variables.get(f"{PREFIX}{field_name}".lower())
        if value is not None and value.startswith("tcp://") and _is_injected(f"{PREFIX}{field_name}".upper()):
            value = None
        return value, field_name, False

    def __call__(self) -> dict[str, Any]:
        """Each setting whose variable is set."""
        found = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in found.items() if value is not None}


def _split_address(text: str) -> urllib.parse.SplitResult | None:
    """The parts of an http or https address that can be posted to; None when it is none."""
    try:
        parts = urllib.parse.urlsplit(text)
        usable = bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        return None
    printable = all(" " < character < "\x7f" for character in text)
    return parts if usable and printable and parts.scheme in {"http", "https"} else None


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_settings() -> Settings:
    """Read every setting from the environment and `.env`; warn of those that are gone.

    Raises:
        SettingsError: A value is wrong, `.env` can't be read, or an `EXTRACTION_…` variable is no setting (a typing
            slip would otherwise be ignored in silence).
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    in_file = _dotenv_variables()
    for variable in (*os.environ, *in_file):
        if not variable.startswith(PREFIX) or variable.startswith(_TEST_PREFIX) or _is_injected(variable):
            continue
        if (name := variable.removeprefix(PREFIX).lower()) in RETIRED:
            _warn_of_retired(name)
        elif variable not in known:
            close = difflib.get_close_matches(variable, known, n=1)
            raise SettingsError(variable, "unknown", f"{close[0]}, perhaps" if close else "a known setting")
    _refuse_odd_prefix(known)
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        raise SettingsError(
            PREFIX + name.upper() if name else "combination", _shown(name), first["msg"].removeprefix("Value error, ")
        ) from None
    for warning in permission_warnings(settings, in_file):
        if warning not in _warned:
            _warned.add(warning)
            _log.warning("%s.", warning)
    return settings


def permission_warnings(settings: Settings, in_file: Iterable[str] | None = None) -> list[str]:
    """Who else may read or change the data folder and `.env`.

    Args:
        settings: Say which folder.
        in_file: The variables that `.env` sets; it is read when None.
    """
    secret = {PREFIX + name.upper() for name in Settings.model_fields if _is_secret(name)}
    variables = set(_dotenv_variables() if in_file is None else in_file)
    dotenv = dotenv_warning(Path(".env"), holds_secrets=not secret.isdisjoint(variables))
    return [warning for warning in (home_warning(settings.home), dotenv) if warning]


def _is_secret(name: str) -> bool:
    return "SecretStr" in str(Settings.model_fields[name].annotation)


def _is_injected(variable: str) -> bool:
    """Whether Kubernetes made a variable: a Service named extraction-… puts its addresses into every pod."""
    services = (name.removesuffix(_SERVICE) for name in os.environ if name.endswith(_SERVICE))
    return any(
        variable.startswith(f"{service}_") and _INJECTED.fullmatch(variable.removeprefix(f"{service}_"))
        for service in services
    )


def _refuse_odd_prefix(known: set[str]) -> None:
    """Refuse a line of `.env` that is a setting but for a slip in its prefix: it would be ignored in silence."""
    for variable in _dotenv_variables():
        prefix, _, name = variable.partition("_")
        odd = variable not in known and f"{PREFIX}{name}" in known
        if odd and difflib.SequenceMatcher(None, f"{prefix}_", PREFIX).ratio() > _NEARLY:
            raise SettingsError(variable, "unknown (in .env)", f"{PREFIX}{name}, perhaps")


def _warn_of_retired(retired: str) -> None:
    if retired in _warned:
        return
    _warned.add(retired)
    name, equals, value = retired.partition("=")
    _log.warning(
        "Setting %s%s%s%s is gone and has no effect: %s. Remove it from the environment and from .env; the next "
        "release refuses it.",
        PREFIX,
        name.upper(),
        equals,
        value,
        RETIRED[retired],
    )


def _dotenv_variables() -> list[str]:
    try:
        file = Path(".env")  # the library looks through each line in time quadratic in its length
        longest = max(map(len, file.read_bytes().splitlines()), default=0) if file.is_file() else 0
        if longest > _LONGEST_LINE:
            raise SettingsError("file .env", f"with a line of {longest} bytes", f"at most {_LONGEST_LINE} in each")
        return [variable.upper() for variable in DotEnvSettingsSource(Settings).env_vars]
    except (OSError, UnicodeDecodeError) as error:
        got = f"unreadable ({type(error).__name__})"
        raise SettingsError(setting="file .env", got=got, expected="UTF-8 lines NAME=value") from None


def _shown(name: str) -> str:
    """The value as it may be printed: never a secret's."""
    if not name:
        return "not consistent"
    if _is_secret(name):
        return "not usable (hidden)"
    value = os.environ.get(PREFIX + name.upper(), "what .env says")
    may_hold_a_secret = name.endswith(("url", "uri")) and any(mark in value for mark in "@?#")
    return "not usable (hidden)" if may_hold_a_secret else repr(value)
