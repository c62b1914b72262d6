"""A table of four real videos, one of them broken, and runs of the real jobs over it."""

import sqlite3

import dagster as dg
import pytest

KEY = "1-4"


class World:
    """A data folder, an instance, and what a person does with them."""

    def __init__(self, home, instance):
        self.home, self.instance = home, instance

    def sql(self, statement, *values):
        connection = sqlite3.connect(self.home / "source.db")
        try:
            rows = connection.execute(statement, values).fetchall()
            connection.commit()
        finally:
            connection.close()
        return rows

    def run(self, job="extraction_job", key=KEY, tags=None, **options):
        """Run a job over a range, as the launchpad would with these options."""
        from extraction_dagster.definitions import defs  # noqa: PLC0415 - reads the environment

        self.instance.add_dynamic_partitions("id_ranges", [key])
        config = {"resources": {"extraction": {"config": options}}} if options else {}
        return defs.resolve_job_def(job).execute_in_process(
            instance=self.instance, partition_key=key, run_config=config, raise_on_error=False, tags=tags
        )

    def shown(self, result, asset):
        """The metadata of an asset's materialization in a run."""
        (materialization,) = result.asset_materializations_for_node(asset)
        return {name: value.value for name, value in materialization.metadata.items()}

    def checks(self, result):
        """What the checks of a run said: `{"video_frames failure_rate": (passed, severity, description)}`."""
        return {
            f"{found.asset_key.to_user_string()} {found.check_name}": (
                found.passed,
                found.severity.value,
                found.description,
            )
            for found in result.get_asset_check_evaluations()
        }

    def ledger(self, columns="record_id, state"):
        return self.sql(f"SELECT {columns} FROM extraction_ledger ORDER BY record_id")

    def points(self):
        """Points by record in the collection in use, read with the engine itself."""
        from extraction_dagster.stages.index.edge.store import EdgeStore  # noqa: PLC0415 - loads the engine

        with EdgeStore(self.home / "qdrant") as store:
            store.open_collection("video_frames")
            return store.count_by_record()


@pytest.fixture
def world(tmp_path, monkeypatch, small_clips):
    """Records 1, 2 and 3 are good, record 4 is broken."""
    for name, value in (("HOME", tmp_path), ("MAX_ATTEMPTS", 1), ("DECODE_WORKERS", 1), ("ALLOWED_ROOTS", small_clips)):
        monkeypatch.setenv(f"EXTRACTION_{name}", str(value))
    with dg.DagsterInstance.ephemeral() as instance:
        world = World(tmp_path, instance)
        world.sql(
            "CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform, code, path, is_extracted BOOLEAN DEFAULT 0, "
            "is_embedded BOOLEAN DEFAULT 0)"
        )
        for number, name in enumerate(("a", "b", "c", "broken"), 1):
            world.sql("INSERT INTO insta_content (id, path) VALUES (?, ?)", number, str(small_clips / f"{name}.mp4"))
        yield world
