"""What makes a range stale: exactly the assets that a changed setting concerns, as Dagster's own API says it."""

import json
import os
import sys

import pytest

from extraction_dagster.defs.instance.launching import launch, open_instance
from extraction_dagster.defs.metadata import code_versions, data_version
from extraction_dagster.records import IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.ledger import LedgerEntry

# Dagster itself reads pydantic's old attribute.
pytestmark = pytest.mark.filterwarnings("ignore:The `__fields__` attribute is deprecated")

ALL = {"video_frames", "frame_embeddings", "qdrant_points"}
VECTORS = {"frame_embeddings", "qdrant_points"}


@pytest.mark.parametrize(
    ("change", "concerned"),
    [
        ({"fps": 2.0}, ALL),
        ({"max_frames": 10}, ALL),
        ({"sampling": "uniform"}, ALL),
        ({"decoder": "decord"}, ALL),
        ({"crop_bars": True}, ALL),
        ({"drop_duplicates": True}, ALL),
        ({"short_side_px": 128}, ALL),
        ({"jpeg_quality": 80}, ALL),
        ({"min_frames": 2}, ALL),
        ({"reject_solid": True}, ALL),
        ({"embedding_dim": 256}, VECTORS),
        ({"embed_dtype": "bfloat16"}, VECTORS),
        ({"resize_on": "device"}, VECTORS),
        ({"num_frames": 8}, set()),  # of another sampling than the one in use
        ({"scene_distance": 0.5}, set()),
        ({"solid_deviation": 9.0}, set()),  # of a step that is off
        ({"decode_workers": 7, "decode_timeout_seconds": 9.0, "shard_records": 5}, set()),
        ({"embed_batch_size": 3, "embed_threads": 1, "device": "cpu", "compile": "onnxruntime"}, set()),
        ({"batch_size": 9, "max_attempts": 9, "max_in_flight": 9, "stuck_seconds": 900}, set()),
        ({"keep_frames": "none", "frames_uri": "memory://frames", "contact_sheet_frames": 0}, set()),
        ({"qdrant_url": "http://localhost:6333", "collection_name": "other"}, set()),
    ],
)
def test_a_setting_concerns_the_assets_that_differ_with_it_and_no_other(settings, change, concerned):
    before, after = code_versions(settings()), code_versions(settings(**change))
    assert before.keys() == after.keys() == ALL
    assert {name for name in ALL if before[name] != after[name]} == concerned


@pytest.mark.parametrize(
    ("chosen", "change", "concerned"),
    [
        ({"sampling": "uniform"}, {"num_frames": 8}, ALL),
        ({"sampling": "uniform"}, {"fps": 2.0, "max_frames": 10}, set()),
        ({"sampling": "keyframes"}, {"max_frames": 10}, ALL),
        ({"sampling": "scene"}, {"scene_distance": 0.5}, ALL),
        ({"reject_solid": True}, {"solid_deviation": 9.0}, ALL),
        ({"drop_duplicates": True}, {"duplicate_bits": 9}, ALL),
    ],
)
def test_a_number_concerns_every_asset_where_its_step_or_sampling_is_on(settings, chosen, change, concerned):
    before, after = code_versions(settings(**chosen)), code_versions(settings(**chosen, **change))
    assert {name for name in ALL if before[name] != after[name]} == concerned


class Asked:
    """Settings that write down which of them were asked for."""

    def __init__(self, settings):
        self.settings, self.names = settings, set()

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(self.settings, name)


def test_no_other_setting_is_so_much_as_looked_at(settings):
    on = {"reject_solid": True, "crop_bars": True, "drop_duplicates": True, "sampling": "scene"}
    asked = Asked(settings(**on))
    code_versions(asked)
    frames = {"decoder", "fps", "jpeg_quality", "max_frames", "min_frames", "num_frames", "short_side_px", "tone_map"}
    numbers = {"duplicate_bits", "scene_distance", "solid_deviation"}
    assert asked.names == frames | {*on} | numbers | {"embed_dtype", "embedding_dim", "model", "resize_on"}


def test_a_model_concerns_vectors_and_points(settings, saved_models):
    before, after = code_versions(settings()), code_versions(settings(model=str(saved_models("clip"))))
    assert {name for name in ALL if before[name] != after[name]} == VECTORS


def entry(record_id, state="done", **changes):
    made = {"frames_fingerprint": "f", "embedding_fingerprint": "e", "num_frames": 3, "content_version": "1"}
    return LedgerEntry(record_id, state, **{**made, **changes})


def version(asset, *entries):
    return data_version(asset, {item.record_id: item for item in entries}).value


def test_a_run_that_changes_nothing_changes_no_data_version():
    for asset in ALL:
        assert version(asset, entry(1), entry(2)) == version(asset, entry(2, attempts=1), entry(1, num_points=3))
    assert len({version(asset, entry(1)) for asset in ALL}) == 3


@pytest.mark.parametrize(
    ("change", "concerned"),
    [
        ({"content_version": "2"}, ALL),
        ({"num_frames": 4}, ALL),
        ({"frames_fingerprint": "g"}, ALL),
        ({"embedding_fingerprint": "d"}, VECTORS),
        ({"state": "embedded"}, {"qdrant_points"}),
        ({"state": "extracted"}, VECTORS),
        ({"state": "failed"}, ALL),
    ],
)
def test_any_changed_record_changes_the_data_versions_that_hold_it(change, concerned):
    changed = {asset for asset in ALL if version(asset, entry(1)) != version(asset, entry(1, **change))}
    assert changed == concerned


# As Dagster's API says it


# What `dagster-graphql` does, with the definitions in its own process; the pages' tests ask a server.
ASK = """
import json, sys
import dagster as dg
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
from dagster_graphql.cli import execute_query

definitions = LoadableTargetOrigin(executable_path=sys.executable, module_name="extraction_dagster.definitions")
target = InProcessWorkspaceLoadTarget(InProcessCodeLocationOrigin(definitions, location_name="extraction_dagster"))
with dg.DagsterInstance.get() as instance, WorkspaceProcessContext(instance, target) as context:
    print(json.dumps(execute_query(context, sys.argv[1])))
"""


@pytest.fixture
def stale(commands):
    """`stale(folder, "1-2", EXTRACTION_FPS="2")`: the stale assets of each range and the kinds of causes."""

    def stale(folder, *ranges, **environment):
        asked = " ".join(
            f'r{number}: assetNodes(assetKeys: [{{path: ["video_frames"]}}, {{path: ["frame_embeddings"]}}, '
            f'{{path: ["qdrant_points"]}}]) {{ assetKey {{ path }} staleStatus(partition: "{key}") '
            f'staleCauses(partition: "{key}") {{ category }} }}'
            for number, key in enumerate(ranges)
        )
        command = [sys.executable, "-c", ASK, f"{{ {asked} }}"]
        done = commands.run(command, cwd=folder, env={**os.environ, **environment}, modules=["dagster_graphql.cli"])
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        return [
            {
                node["assetKey"]["path"][0]: [cause["category"] for cause in node["staleCauses"]]
                for node in answer["data"][f"r{number}"]
                if node["staleStatus"] != "FRESH"
            }
            for number in range(len(ranges))
        ]

    return stale


@pytest.fixture
def two_ranges(world, monkeypatch):
    """Ranges 1-2 and 3-4, made with the settings as they are."""
    with open_instance(load_settings()) as instance:
        for id_range in (IdRange(1, 2), IdRange(3, 4)):
            assert launch(instance, id_range).success
        world.instance = instance
        monkeypatch.setenv("DAGSTER_HOME", os.environ["DAGSTER_HOME"])
        yield world


CODE = ["CODE"]


@pytest.mark.slow
def test_a_changed_setting_shows_exactly_its_assets_as_stale(stale, two_ranges, saved_models):
    folder = two_ranges.home
    assert stale(folder, "1-2", "3-4", EXTRACTION_EMBED_BATCH_SIZE="3", EXTRACTION_DECODE_WORKERS="2") == [{}, {}]
    everything = dict.fromkeys(ALL, CODE)
    assert stale(folder, "1-2", "3-4", EXTRACTION_FPS="2") == [everything, everything]
    clip = str(saved_models("clip"))
    assert stale(folder, "1-2", EXTRACTION_MODEL=clip) == [dict.fromkeys(VECTORS, CODE)]


@pytest.mark.slow
def test_a_range_made_with_options_of_its_own_is_stale_until_the_settings_say_the_same(stale, two_ranges):
    world, folder = two_ranges, two_ranges.home
    assert world.run(key="1-2", fps=2.0).success
    assert stale(folder, "1-2", "3-4") == [dict.fromkeys(ALL, CODE), {}]
    assert stale(folder, "1-2", "3-4", EXTRACTION_FPS="2") == [{}, dict.fromkeys(ALL, CODE)]


@pytest.mark.slow
def test_what_is_made_of_other_contents_than_upstream_holds_now_is_stale(stale, two_ranges):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    world, folder = two_ranges, two_ranges.home
    assert world.run("embedding_job", key="1-2", force=True).success

    world.sql("UPDATE insta_content SET is_extracted = 0, is_embedded = 0 WHERE id = 2")
    chain = defs.resolve_job_def("extraction_job")
    alone = chain.get_subset(asset_selection={next(iter(defs.get_assets_def("video_frames").keys))})
    assert alone.execute_in_process(instance=world.instance, partition_key="1-2").success
    assert stale(folder, "1-2", "3-4") == [{"frame_embeddings": ["DATA"]}, {}]
    assert world.run("embedding_job", key="1-2").success
    assert stale(folder, "1-2") == [{}]
