"""The resource that assets and sensors work with: the settings, with the options of one run in their place.

`open_step` is an asset's way into the room `ranges`: the run's options and partition in, an open `RangeWork` out.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from extraction_dagster.defs.partitions import above_floor, add_ranges, process_tags
from extraction_dagster.errors import ExtractionError
from extraction_dagster.errors.runs import OtherModelError, SettingsChangedError
from extraction_dagster.interrupts import redeliver_dropped_interrupts
from extraction_dagster.records import IdRange
from extraction_dagster.run_options import (
    OVERRIDABLE,
    describe_option,
    describe_options,
    model_as_environment,
    settings_with,
)
from extraction_dagster.settings import Settings, load_settings

if TYPE_CHECKING:
    from extraction_dagster.ranges.work import RangeWork
    from extraction_dagster.stages.catalog.catalog import Catalog, Fingerprints

_log = logging.getLogger(__name__)  # managed by Dagster: these lines are in the run's events too
OPTIONS_TAG = "extraction/options"
_RETRY_OF_TAG = "dagster/parent_run_id"  # Dagster's own: the run that this one goes on with
MADE_WITH_TAG = ".dagster/extraction_made_with"  # with this prefix, Dagster's pages do not show it


class DecoderChoice(Enum):
    """The decoders that the launchpad offers, by name."""

    pyav = "pyav"
    decord = "decord"


class SamplingChoice(Enum):
    """The ways of sampling that the launchpad offers, by name."""

    fps = "fps"
    uniform = "uniform"
    keyframes = "keyframes"
    scene = "scene"


def _option(name: str) -> Any:  # noqa: ANN401 - pydantic's own type for a field
    """An option that may be left out; its description is the setting's."""
    return Field(None, description=describe_option(name))


class Extraction(dg.ConfigurableResource):  # type: ignore[type-arg]  # not generic for its users
    """What this run does differently from the settings; all that is left out is as they say."""

    force: bool = Field(
        default=False,
        description="Do every record of the range again, done and parked ones too. What the job begins with decides "
        "what is done again: decoding (extraction_job), embedding (embedding_job) or indexing (indexing_job).",
    )
    decoder: DecoderChoice | None = _option("decoder")
    sampling: SamplingChoice | None = _option("sampling")
    fps: float | None = _option("fps")
    num_frames: int | None = _option("num_frames")
    max_frames: int | None = _option("max_frames")
    min_frames: int | None = _option("min_frames")
    scene_distance: float | None = _option("scene_distance")
    reject_solid: bool | None = _option("reject_solid")
    crop_bars: bool | None = _option("crop_bars")
    drop_duplicates: bool | None = _option("drop_duplicates")
    model: str | None = _option("model")
    embedding_dim: int | None = _option("embedding_dim")
    device: str | None = _option("device")
    embed_batch_size: int | None = _option("embed_batch_size")
    decode_workers: int | None = _option("decode_workers")
    decode_timeout_seconds: float | None = _option("decode_timeout_seconds")

    @property
    def options(self) -> dict[str, object]:
        """What this run does differently from the settings, by the name of the setting."""
        given = {name: getattr(self, name) for name in OVERRIDABLE}
        return {
            name: value.value if isinstance(value, Enum) else value
            for name, value in given.items()
            if value is not None
        }

    @property
    def settings(self) -> Settings:
        """Every setting, read now from the environment of this process and `.env`, with the run's options in place.

        Two readings may differ: read once, and pass on what was read.
        """
        return settings_with(self.options)

    @contextmanager
    def catalog(self) -> Iterator["Catalog"]:
        """The source table and the ledger, as the settings are now; for work that makes no frames or vectors."""
        from extraction_dagster.stages.catalog.catalog import open_catalog

        with open_catalog(self.settings) as catalog:
            yield catalog

    def refuse_unstaged_model(self, settings: Settings, fingerprints: "Fingerprints") -> None:
        """Refuse options that give other vectors than the settings do, unless a collection was staged for them.

        Args:
            settings: The run's, its options included.
            fingerprints: What frames and vectors of the run are made with.

        Raises:
            OtherModelError: There is no such collection; nothing was done yet.
        """
        from extraction_dagster.ranges.work import fingerprints_of

        wanted = fingerprints.embedding
        if not self.options or wanted == fingerprints_of(load_settings()).embedding:
            return
        from extraction_dagster.stages.index.stage import open_point_store

        with open_point_store(settings, wait_seconds=settings.qdrant_timeout_seconds) as store:
            there = store.collections(settings.collection_name)
        if wanted not in there:
            of_model = {name: value for name, value in self.options.items() if name in {"model", "embedding_dim"}}
            raise OtherModelError(
                describe_options(of_model),
                fingerprint=wanted,
                collection=settings.collection_name,
                there=", ".join(sorted(there)) or "none",
                environment=model_as_environment(settings),
            )


@contextmanager
def plain_failures() -> Iterator[None]:
    """Show an error of this project as its one clear line, without a traceback."""
    try:
        yield
    except ExtractionError as error:
        raise dg.Failure(
            description=str(error), metadata={"error_type": type(error).__name__}, allow_retries=not error.permanent
        ) from error


@contextmanager
def open_step(
    context: dg.AssetExecutionContext, extraction: Extraction, *, begins: bool = False
) -> Iterator["RangeWork"]:
    """Open what a step needs; whatever is wrong with the run's options or its range is refused here, before any work.

    Args:
        context: The step's.
        extraction: The run's options; the settings are read once, here.
        begins: It is the first asset: rows that are asked for again get their new revision.
    """
    from extraction_dagster.ranges.work import fingerprints_of, open_range, vectors_fingerprint
    from extraction_dagster.stages.catalog.signs import signs_of_life

    with (
        plain_failures(),
        _log_how_to_resume(context.partition_key),
        redeliver_dropped_interrupts(dg.DagsterExecutionInterruptedError),
    ):
        settings = extraction.settings
        fingerprints = fingerprints_of(settings)
        id_range = IdRange.parse(context.partition_key)
        add_ranges(context.instance, [id_range])  # so that any valid range can be launched without preparation
        is_first = _tag_run(context, extraction, vectors_fingerprint(fingerprints))
        extraction.refuse_unstaged_model(settings, fingerprints)
        with (
            open_range(
                settings,
                id_range,
                within=above_floor(context, id_range),
                begins=begins,
                claims=is_first,
                force=extraction.force,
                retries=_RETRY_OF_TAG in context.run.tags,
                fingerprints=fingerprints,
                run_id=context.run.run_id,
            ) as work,
            signs_of_life(
                work.catalog.state_engine, context.run.run_id, dead_after_seconds=settings.dead_after_seconds
            ),
        ):
            yield work


def _tag_run(context: dg.AssetExecutionContext, extraction: Extraction, made_with: str) -> bool:
    """Note in the run what works on it and how: its process, its options, and the fingerprints of its first step.

    A run that is launched again inherits the tags of the run before it; so they name the run that they speak of.
    Returns whether this step is the run's first one.

    Raises:
        SettingsChangedError: An earlier step of this run had other fingerprints.
    """
    run_id = context.run.run_id
    run = context.instance.get_run_by_id(run_id)
    known = run.tags if run else context.run.tags  # the context's are those with which the run began
    of_run, _, began = known.get(MADE_WITH_TAG, "").partition(":")
    if of_run == run_id and began != made_with:
        raise SettingsChangedError(context.partition_key, began=began, now=made_with)
    tags = {**process_tags(run_id), MADE_WITH_TAG: f"{run_id}:{made_with}"}
    if extraction.options or OPTIONS_TAG in known:
        tags[OPTIONS_TAG] = describe_options(extraction.options) or "none"
    if not tags.items() <= known.items():
        context.instance.add_run_tags(run_id, tags)
    return of_run != run_id


@contextmanager
def _log_how_to_resume(key: str) -> Iterator[None]:
    """Log what a run that somebody stops (Ctrl+C, SIGTERM, *Terminate*) leaves, and how it goes on."""
    try:
        yield
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
        _log.info(
            "Range %s was stopped. What was finished is kept and marked, and its next run goes on from there: the "
            "sensor requests one by itself, 'extraction launch %s' starts one at once.",
            key,
            key,
        )
        raise
