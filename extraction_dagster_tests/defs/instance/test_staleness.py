"""Which ranges are stale: the same as Dagster's own resolver says, asset by asset and range by range."""

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest

from extraction_dagster.defs.instance.backfills import stale_ranges
from extraction_dagster.defs.partitions import add_ranges, id_ranges
from extraction_dagster.records import IdRange

RANGES = [IdRange(1, 9), IdRange(10, 19), IdRange(20, 29)]


def make_definitions(frames="f1", vectors="v1", points="v1"):
    """The project's chain with empty steps: three assets over the same ranges, behind a table."""
    table = dg.AssetSpec("videos")

    @dg.asset(partitions_def=id_ranges, code_version=frames, deps=[table])
    def video_frames():
        pass

    @dg.asset(partitions_def=id_ranges, code_version=vectors, deps=[video_frames])
    def frame_embeddings():
        pass

    @dg.asset(partitions_def=id_ranges, code_version=points, deps=[frame_embeddings])
    def qdrant_points():
        pass

    return dg.Definitions(assets=[table, video_frames, frame_embeddings, qdrant_points])


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        add_ranges(instance, RANGES)
        yield instance


def materialize(instance, definitions, id_range, *names):
    assets = [asset for asset in definitions.assets if isinstance(asset, dg.AssetsDefinition)]
    chosen = [asset for asset in assets if asset.key.to_user_string() in names]
    others = [asset for asset in assets if asset not in chosen]
    dg.materialize([*chosen, *others], selection=chosen, instance=instance, partition_key=id_range.partition_key)


ALL = ("video_frames", "frame_embeddings", "qdrant_points")


def stale(instance, definitions, *names):
    keys = [dg.AssetKey(name) for name in names or ALL]
    return stale_ranges(instance, definitions.resolve_asset_graph(), RANGES, keys)


def check_against_dagster(instance, definitions):
    """Ask Dagster's own resolver about each asset and range."""
    graph = definitions.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    for name in ALL:
        ours = stale(instance, definitions, name)
        for id_range in RANGES:
            status = resolver.get_status(dg.AssetKey(name), id_range.partition_key)
            assert (id_range in ours) == (status.value != "FRESH"), (name, str(id_range), status)


def test_what_was_never_materialized_is_stale(instance):
    definitions = make_definitions()
    materialize(instance, definitions, RANGES[0], *ALL)
    materialize(instance, definitions, RANGES[1], "video_frames", "frame_embeddings")
    assert stale(instance, definitions) == {RANGES[1], RANGES[2]}
    assert stale(instance, definitions, "video_frames", "frame_embeddings") == {RANGES[2]}
    check_against_dagster(instance, definitions)


def test_changed_settings_of_one_asset_make_it_stale_and_no_other(instance):
    for id_range in RANGES:
        materialize(instance, make_definitions(), id_range, *ALL)
    changed = make_definitions(vectors="v2", points="v2")
    assert stale(instance, changed, "video_frames") == set()
    assert stale(instance, changed, "frame_embeddings") == set(RANGES)
    assert stale(instance, changed, "qdrant_points") == set(RANGES)
    check_against_dagster(instance, changed)
    materialize(instance, changed, RANGES[1], *ALL)
    assert stale(instance, changed) == {RANGES[0], RANGES[2]}
    check_against_dagster(instance, changed)


def test_a_range_whose_inputs_were_made_anew_with_other_settings_is_stale(instance):
    for id_range in RANGES:
        materialize(instance, make_definitions(), id_range, *ALL)
    changed = make_definitions(frames="f2")
    materialize(instance, changed, RANGES[0], "video_frames")
    assert stale(instance, changed, "frame_embeddings") == {RANGES[0]}
    assert stale(instance, changed, "qdrant_points") == set()
    check_against_dagster(instance, changed)


def test_the_same_frames_made_once_more_make_nothing_stale(instance):
    definitions = make_definitions()
    for id_range in RANGES:
        materialize(instance, definitions, id_range, *ALL)
    materialize(instance, definitions, RANGES[0], "video_frames")
    assert stale(instance, definitions) == set()
    check_against_dagster(instance, definitions)


def test_many_ranges_are_asked_for_in_pages(instance, monkeypatch):
    monkeypatch.setattr("extraction_dagster.defs.instance.backfills._PAGE", 2)
    definitions = make_definitions()
    for id_range in RANGES:
        materialize(instance, definitions, id_range, *ALL)
    assert stale(instance, definitions) == set()
