"""What a person launches: the chain, a part of it, and the options of one run."""

import shutil
from typing import get_args

import dagster as dg
import pytest
from dagster._core.errors import DagsterExecutionInterruptedError

from extraction_dagster.defs import jobs
from extraction_dagster.defs.jobs import pod_tags
from extraction_dagster.defs.resources import DecoderChoice, Extraction, SamplingChoice
from extraction_dagster.run_options import OVERRIDABLE
from extraction_dagster.settings import Settings, load_settings

# Dagster itself reads pydantic's old attribute.
pytestmark = pytest.mark.filterwarnings("ignore:The `__fields__` attribute is deprecated")

CHAIN = ["video_frames", "frame_embeddings", "qdrant_points"]


def steps(result):
    return [event.step_key for event in result.all_events if event.event_type == dg.DagsterEventType.STEP_SUCCESS]


def why(result):
    """The sentence with which the first failed step ended."""
    return next(
        event.step_failure_data.user_failure_data.description for event in result.all_events if event.is_step_failure
    )


def shards(world, kind):
    return {path: path.stat().st_mtime_ns for path in (world.home / kind).rglob("*.parquet")}


@pytest.fixture
def out_of_reach(world, monkeypatch):
    """From now on no video can be read: whoever decodes fails."""
    return lambda: monkeypatch.setenv("EXTRACTION_ALLOWED_ROOTS", str(world.home / "nowhere"))


# What there is to launch


@pytest.mark.parametrize(
    ("job", "assets"),
    [("extraction_job", CHAIN), ("embedding_job", CHAIN[1:]), ("indexing_job", CHAIN[2:])],
)
def test_each_job_makes_its_part_of_the_chain_in_one_process(job, assets):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    found = defs.resolve_job_def(job)
    assert sorted(node.name for node in found.nodes) == sorted(assets)
    assert found.executor_def.name == "in_process"


def test_work_on_what_is_stored_waits_for_new_rows():
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    priority = {
        job: defs.resolve_job_def(job).tags.get("dagster/priority") for job in ("extraction_job", "embedding_job")
    }
    assert priority == {"extraction_job": None, "embedding_job": "-1"}
    assert defs.resolve_job_def("indexing_job").tags["dagster/priority"] == "-1"


PODS = {
    "RUN_CPU": "4",
    "RUN_MEMORY": "8Gi",
    "RUN_GPUS": "1",
    "RUN_NODE_SELECTOR": '{"pool": "gpu"}',
    "RUN_TOLERATIONS": '[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]',
    "RUN_QUEUE": "video-frames",
}


def pod_of(tags):
    """The job of Kubernetes that dagster-k8s itself makes of a run with these tags."""
    from dagster_k8s.job import (  # noqa: PLC0415 - loads Kubernetes' client
        DagsterK8sJobConfig,
        construct_dagster_k8s_job,
        get_user_defined_k8s_config,
    )

    config = DagsterK8sJobConfig(job_image="x", dagster_home="/x", instance_config_map="x")
    job = construct_dagster_k8s_job(
        config, args=["x"], job_name="x", user_defined_k8s_config=get_user_defined_k8s_config(tags)
    )
    spec = job.spec.template.spec
    return job.metadata.labels, spec, spec.containers[0].resources


def test_settings_shape_the_pods_of_runs_and_gpus_are_for_jobs_that_embed(monkeypatch):
    for name, value in PODS.items():
        monkeypatch.setenv(f"EXTRACTION_{name}", value)
    labels, spec, resources = pod_of(pod_tags(load_settings(), embeds=True))
    assert labels["kueue.x-k8s.io/queue-name"] == "video-frames"
    assert resources.limits == resources.requests == {"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": "1"}
    assert spec.node_selector == {"pool": "gpu"}
    assert [(taint.key, taint.operator, taint.effect) for taint in spec.tolerations] == [
        ("nvidia.com/gpu", "Exists", "NoSchedule")
    ]
    labels, spec, resources = pod_of(pod_tags(load_settings(), embeds=False))
    assert labels["kueue.x-k8s.io/queue-name"] == "video-frames"
    assert resources.limits == {"cpu": "4", "memory": "8Gi"}
    assert (spec.node_selector, spec.tolerations) == (None, None)


def test_without_such_settings_no_run_has_such_a_tag(monkeypatch):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    assert pod_tags(load_settings(), embeds=True) == {}
    assert "dagster-k8s/config" not in defs.resolve_job_def("extraction_job").tags
    monkeypatch.setenv("EXTRACTION_RUN_QUEUE", "video-frames")
    job = jobs._job("x_job", *CHAIN, tags={"a": "b"}, description="x")
    assert job.tags == {
        "a": "b",
        "dagster-k8s/config": '{"job_metadata": {"labels": {"kueue.x-k8s.io/queue-name": "video-frames"}}}',
    }


def launchpad_fields():
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    schema = defs.resolve_job_def("extraction_job").run_config_schema.config_type
    return schema.fields["resources"].config_type.fields["extraction"].config_type.fields["config"].config_type.fields


def test_the_launchpad_offers_every_option_with_what_it_means_and_asks_for_none():
    fields = launchpad_fields()
    assert set(fields) == {"force", *OVERRIDABLE}
    assert not any(field.is_required for field in fields.values())
    assert fields["fps"].description == (
        "Frames per second of video, for sampling=fps. Left out: as EXTRACTION_FPS says."
    )
    assert "Do every record of the range again" in fields["force"].description


@pytest.mark.parametrize(("choice", "setting"), [(SamplingChoice, "sampling"), (DecoderChoice, "decoder")])
def test_the_launchpad_offers_the_choices_of_the_setting(choice, setting):
    assert [item.name for item in choice] == [item.value for item in choice]
    assert tuple(item.value for item in choice) == get_args(Settings.model_fields[setting].annotation)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampling": "every frame"}, "not in enum type"),
        ({"fsp": 2.0}, 'Received unexpected config entry "fsp"'),
        ({"num_frames": "many"}, "Invalid scalar"),
    ],
)
def test_a_slip_is_refused_before_there_is_a_run(world, options, words):
    with pytest.raises(dg.DagsterInvalidConfigError, match=words):
        world.run(**options)
    assert world.instance.get_runs() == []


# The options of one run


def test_a_value_that_is_out_of_range_is_refused_before_any_work(world):
    result = world.run(fps=-1.0)
    assert not result.success
    assert why(result).startswith(
        "Run option fps is -1.0, expected Input should be greater than 0. Nothing was started."
    )
    assert steps(result) == []
    assert not (world.home / "frames").exists()
    assert world.sql("SELECT name FROM sqlite_master WHERE name = 'extraction_ledger'") == []


def test_another_sampling_holds_for_one_run_and_is_written_down(world):
    assert world.run().success
    assert world.points() == {1: 3, 2: 3, 3: 3}
    usual = set(world.ledger("frames_fingerprint")[:3])

    result = world.run(fps=2)
    assert result.success
    assert world.points() == {1: 6, 2: 6, 3: 6}
    assert world.shown(result, "qdrant_points")["options"] == "fps=2.0"
    assert world.instance.get_run_by_id(result.run_id).tags["extraction/options"] == "fps=2.0"
    other = set(world.ledger("frames_fingerprint")[:3])
    assert len(other) == 1
    assert other != usual
    assert world.shown(result, "video_frames")["frames_fingerprint"] == next(iter(other))[0]

    plain = world.run()
    assert "options" not in world.shown(plain, "qdrant_points")
    assert world.points() == {1: 3, 2: 3, 3: 3}
    assert world.shown(plain, "video_frames")["frames"] == 0  # those of the first run were still there
    assert world.ledger("state") == [("done",), ("done",), ("done",), ("parked",)]


def test_another_sampling_is_no_difference_and_makes_nothing_pending(world):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment
    from extraction_dagster.stages.catalog.catalog import open_catalog  # noqa: PLC0415
    from extraction_dagster.stages.catalog.pending import scan  # noqa: PLC0415

    world.run(fps=2.0)
    compared = defs.resolve_job_def("reconcile_job").execute_in_process(instance=world.instance)
    (evaluation,) = compared.get_asset_check_evaluations()
    assert evaluation.description == "The collection agrees with the table: 3 records, 18 points."
    with open_catalog(load_settings()) as catalog:
        assert scan(catalog, after_id=None, up_to_id=None, budget=100, every_row=True).unfinished == ()


def test_a_run_that_is_launched_again_without_its_options_does_not_keep_their_tag(world):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    world.instance.add_dynamic_partitions("id_ranges", ["1-4"])
    result = defs.resolve_job_def("extraction_job").execute_in_process(
        instance=world.instance, partition_key="1-4", tags={"extraction/options": "fps=2.0"}
    )
    assert world.instance.get_run_by_id(result.run_id).tags["extraction/options"] == "none"


def test_another_model_is_refused_before_any_work_when_no_collection_waits_for_it(world, saved_models):
    clip = str(saved_models("clip"))
    result = world.run(model=clip)
    assert not result.success
    sentence = why(result)
    assert f"The run's config (model={clip}) gives vectors of fingerprint" in sentence
    assert "no collection 'video_frames' takes them (there: none). Nothing was started" in sentence
    assert f"Run 'EXTRACTION_MODEL={clip} extraction collection stage' first" in sentence
    assert not (world.home / "frames").exists()


def test_another_model_that_does_not_exist_is_refused_before_any_work(world):
    result = world.run(model="no-such-model")
    assert "no-such-model" in why(result)
    assert not (world.home / "frames").exists()


@pytest.mark.slow
def test_another_model_fills_the_collection_that_was_staged_for_it_and_no_other(world, saved_models, out_of_reach):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment
    from extraction_dagster.stages.embed.models.registry import load_model  # noqa: PLC0415
    from extraction_dagster.stages.index.edge.store import EdgeStore  # noqa: PLC0415
    from extraction_dagster.stages.index.protocol import CollectionSpec  # noqa: PLC0415
    from extraction_dagster.stages.index.staging import list_collections, stage_collection  # noqa: PLC0415

    world.run()
    out_of_reach()
    clip = str(saved_models("clip"))
    settings = load_settings().model_copy(update={"model": clip})
    model = load_model(settings)
    with EdgeStore(world.home / "qdrant") as store:
        stage_collection(store, CollectionSpec.of(settings, dim=model.dim, fingerprint=model.fingerprint))

    result = world.run("embedding_job", model=clip)

    assert result.success
    assert world.shown(result, "frame_embeddings")["embedding_fingerprint"] == model.fingerprint
    with EdgeStore(world.home / "qdrant") as store:
        found = [(item.in_use, item.points) for item in list_collections(store, "video_frames")]
    assert found == [(True, 9), (False, 9)]
    compared = defs.resolve_job_def("reconcile_job").execute_in_process(instance=world.instance, raise_on_error=False)
    assert compared.success


# Parts of the chain


def test_embedding_again_decodes_nothing_and_writes_every_vector_anew(world, out_of_reach):
    world.run()
    out_of_reach()
    frames, vectors = shards(world, "frames"), shards(world, "embeddings")

    result = world.run("embedding_job", force=True)

    assert result.success
    assert steps(result) == ["frame_embeddings", "qdrant_points"]
    assert world.shown(result, "frame_embeddings")["frames"] == 9
    assert world.shown(result, "qdrant_points")["points"] == 9
    assert shards(world, "frames") == frames
    anew = shards(world, "embeddings")
    assert vectors.items() < anew.items()
    assert len(anew) == 2 * len(vectors)
    assert world.ledger()[:3] == [(1, "done"), (2, "done"), (3, "done")]


def test_without_force_there_is_nothing_to_embed_again(world):
    world.run()
    vectors = shards(world, "embeddings")
    result = world.run("embedding_job")
    assert world.shown(result, "frame_embeddings")["frames"] == 0
    assert shards(world, "embeddings") == vectors


def test_indexing_again_embeds_nothing_and_writes_every_point_anew(world, monkeypatch):
    world.run()
    vectors = shards(world, "embeddings")
    shutil.rmtree(world.home / "frames")
    monkeypatch.setenv("EXTRACTION_SOURCE_PAYLOAD_COLUMNS", "is_extracted")

    assert world.shown(world.run("indexing_job"), "qdrant_points")["points"] == 0
    result = world.run("indexing_job", force=True)

    assert steps(result) == ["qdrant_points"]
    assert world.shown(result, "qdrant_points")["points"] == 9
    assert shards(world, "embeddings") == vectors
    assert payload_keys(world) >= {"is_extracted", "record_id"}


def payload_keys(world):
    from extraction_dagster.stages.index.edge.store import EdgeStore  # noqa: PLC0415 - loads the engine

    with EdgeStore(world.home / "qdrant") as store:
        store.open_collection("video_frames")
        return {name for batch in store.read() for payload in batch.payloads for name in payload}


def test_embedding_again_without_the_frames_fails_and_leaves_what_is_there(world):
    world.run()
    shutil.rmtree(world.home / "frames")
    result = world.run("embedding_job", force=True)
    assert not result.success
    assert why(result).startswith(
        "Range 1-4: 3 records have no stored frames of these settings (records 1, 2, 3). The others were embedded"
    )
    assert "Launch extraction_job" in why(result)
    assert world.points() == {1: 3, 2: 3, 3: 3}
    assert world.ledger()[:3] == [(1, "done"), (2, "done"), (3, "done")]


def test_indexing_again_without_the_vectors_fails_and_leaves_what_is_there(world):
    world.run()
    shutil.rmtree(world.home / "embeddings")
    result = world.run("indexing_job", force=True)
    assert not result.success
    assert "3 records have no stored vectors of these settings" in why(result)
    assert world.points() == {1: 3, 2: 3, 3: 3}


def test_another_sampling_can_not_be_embedded_before_it_was_decoded(world):
    world.run()
    result = world.run("embedding_job", fps=2.0)
    assert "3 records have no stored frames of these settings" in why(result)
    assert result.asset_materializations_for_node("frame_embeddings") == []


# Force


def test_force_decodes_every_record_again_parked_ones_too(world):
    world.run()
    result = world.run(force=True)
    shown = world.shown(result, "video_frames")
    assert (shown["videos"], shown["frames"], shown["failures"]) == (3, 9, 1)
    assert world.points() == {1: 3, 2: 3, 3: 3}
    assert world.ledger("record_id, state, content_version") == [
        (1, "done", "~1"),
        (2, "done", "~1"),
        (3, "done", "~1"),
        (4, "parked", "~1"),
    ]


@pytest.mark.parametrize(("tags", "frames", "version"), [({}, 9, "~2"), ({"dagster/parent_run_id": "it"}, 0, "~1")])
def test_a_forced_run_that_broke_off_goes_on_when_it_is_retried_and_begins_anew_when_it_is_launched(
    world, monkeypatch, tags, frames, version
):
    from extraction_dagster.stages.index import stage  # noqa: PLC0415 - beside the fault

    world.run()
    honest = stage.replace_records

    def store_is_down(*_, **__):
        message = "the store is down"
        raise OSError(message)

    monkeypatch.setattr(stage, "replace_records", store_is_down)
    first = world.run(force=True)
    assert not first.success
    monkeypatch.setattr(stage, "replace_records", honest)

    again = world.run(force=True, tags=tags)
    assert world.shown(again, "video_frames")["frames"] == frames
    assert world.ledger("content_version")[:3] == [(version,)] * 3
    assert world.points() == {1: 3, 2: 3, 3: 3}


@pytest.mark.parametrize("step", ["decode", "embed", "index"])
def test_a_run_that_is_stopped_says_what_it_leaves_and_how_to_go_on(world, monkeypatch, caplog, step):
    def stopped(_work):
        raise DagsterExecutionInterruptedError

    monkeypatch.setattr(f"extraction_dagster.ranges.{step}.{step}_range", stopped)
    with caplog.at_level("INFO", "extraction_dagster"):
        result = world.run()
    assert not result.success
    assert caplog.text.count("Range 1-4 was stopped. What was finished is kept and marked") == 1
    assert "'extraction launch 1-4' starts one at once." in caplog.text


def test_the_sensors_runs_carry_no_options(world, monkeypatch):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    monkeypatch.setenv("EXTRACTION_BATCH_SIZE", "4")
    sensor = defs.resolve_sensor_def("extraction_sensor")
    context = dg.build_sensor_context(instance=world.instance, definitions=defs, resources={"extraction": Extraction()})
    tick = sensor.evaluate_tick(context)
    assert [(request.partition_key, request.run_config) for request in tick.run_requests] == [("1-4", {})]
