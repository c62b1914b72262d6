"""Settings that change while a run works: what a step stores is what it marks, and no later step mixes the two."""

from pathlib import Path

import pytest

from extraction_dagster.stages.catalog.catalog import Catalog
from extraction_dagster.stages.embed.models import registry
from extraction_dagster.stages.index import stage

# Dagster itself reads pydantic's old attribute.
pytestmark = pytest.mark.filterwarnings("ignore:The `__fields__` attribute is deprecated")


def change_before(monkeypatch, owner, name, change):
    """Call `change` once, just before the first call of a function."""
    honest, changes = getattr(owner, name), [change]

    def changed(*arguments, **options):
        if changes:
            changes.pop()()
        return honest(*arguments, **options)

    monkeypatch.setattr(owner, name, changed)


def stored(world, kind):
    return {path.parent.parent.name for path in (world.home / kind).rglob("*.parquet")}


def marked(world, column="frames_fingerprint"):
    return {found for (found,) in world.ledger(f"{column}") if found is not None}


def why(result):
    """The sentence with which the first failed step ended."""
    return next(
        event.step_failure_data.user_failure_data.description for event in result.all_events if event.is_step_failure
    )


@pytest.mark.parametrize("where", ["environment", ".env"])
def test_frames_are_stored_and_marked_under_the_settings_that_made_them(world, monkeypatch, where):
    def change():
        if where == ".env":
            Path(".env").write_text("EXTRACTION_FPS=2\n")
        else:
            monkeypatch.setenv("EXTRACTION_FPS", "2")

    change_before(monkeypatch, Catalog, "begin", change)
    result = world.run()

    assert stored(world, "frames") == marked(world)
    assert len(marked(world)) == 1
    assert world.ledger("state, num_frames")[:3] == [("extracted", 3)] * 3
    assert not result.success
    assert why(result).startswith("Range 1-4: settings that decide frames or vectors have changed since its run began")
    assert not (world.home / "embeddings").exists()

    assert world.run().success
    assert world.points() == {1: 6, 2: 6, 3: 6}
    assert len(marked(world)) == 1
    assert marked(world) < stored(world, "frames")


def test_vectors_are_stored_and_marked_under_the_settings_that_made_them(world, monkeypatch):
    change_before(monkeypatch, registry, "load_model", lambda: monkeypatch.setenv("EXTRACTION_EMBEDDING_DIM", "256"))
    result = world.run()

    (frames,), (vectors,) = marked(world), marked(world, "embedding_fingerprint")
    assert stored(world, "embeddings") == {f"{frames}-{vectors}"}
    assert world.ledger("state")[:3] == [("embedded",)] * 3
    assert not result.success
    assert f"it began with {frames}-{vectors}" in why(result)
    assert "Launch the range again ('extraction launch 1-4')" in why(result)
    assert not (world.home / "qdrant").exists()


def test_points_are_made_and_marked_under_the_settings_with_which_the_step_began(world, monkeypatch):
    change_before(monkeypatch, stage, "open_point_store", lambda: monkeypatch.setenv("EXTRACTION_FPS", "2"))
    monkeypatch.setenv("EXTRACTION_KEEP_FRAMES", "none")
    assert world.run().success
    (frames,), (vectors,) = marked(world), marked(world, "embedding_fingerprint")
    assert stored(world, "embeddings") == {f"{frames}-{vectors}"}
    assert stored(world, "frames") == set()
    assert world.points() == {1: 3, 2: 3, 3: 3}


def test_a_run_that_is_launched_again_is_not_bound_to_the_settings_of_the_first(world, monkeypatch):
    from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

    first = world.run()
    inherited = world.instance.get_run_by_id(first.run_id).tags
    monkeypatch.setenv("EXTRACTION_FPS", "2")
    again = defs.resolve_job_def("extraction_job").execute_in_process(
        instance=world.instance, partition_key="1-4", tags=inherited
    )
    assert again.success
    assert world.points() == {1: 6, 2: 6, 3: 6}


def test_a_model_whose_files_were_replaced_since_the_step_began_embeds_nothing(world, monkeypatch):
    honest = registry.embedding_fingerprint
    change_before(
        monkeypatch,
        registry,
        "load_model",
        lambda: monkeypatch.setattr(registry, "embedding_fingerprint", lambda settings: f"new-{honest(settings)}"),
    )
    result = world.run()
    assert not result.success
    assert "and now they give" in why(result)
    assert stored(world, "embeddings") == set()
    assert world.ledger("state")[:3] == [("extracted",)] * 3
