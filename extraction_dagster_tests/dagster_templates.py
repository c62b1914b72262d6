"""Dagster's own SQLite files, made once a session and copied: making them is half a CPU second an instance, each time.

The files are those that Dagster makes. What a test starts as a program of its own (the demo, daemons, `dagster dev`)
makes them itself.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

_STATE = sys.__dict__.setdefault("_extraction_dagster_templates", {"used": False})  # a forked session inherits it


def use_templates(folder):
    """From now on this process reads Dagster's migrations once, and copies the files that a new instance begins with.

    Args:
        folder: Where the templates are kept; they are made there at the first call.
    """
    if "dagster" in sys.modules and not _STATE["used"]:
        _STATE["used"] = True
        _read_migrations_once()
        _copy_storage(Path(folder))


def _read_migrations_once():
    """Dagster reads 90 files at each opening of an instance, to learn which migration is the last."""
    import alembic.script

    read, known = alembic.script.ScriptDirectory.from_config, {}

    def from_config(config):
        location = str(config.get_main_option("script_location"))
        if not location.startswith("dagster:"):
            return read(config)
        if location not in known:
            known[location] = read(config)
        return known[location]

    alembic.script.ScriptDirectory.from_config = staticmethod(from_config)


def _copy_storage(folder):
    from dagster._core.storage.event_log import SqliteEventLogStorage
    from dagster._core.storage.sqlite_storage import DagsterSqliteStorage

    storage, run = folder / "storage", folder / "run.db"
    if not run.exists():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            shutil.copytree(_new_storage(Path(made) / "made"), storage, dirs_exist_ok=True)
            (Path(made) / "made" / "history" / "runs" / "a-run.db").replace(run)
    open_storage, make_log = DagsterSqliteStorage.from_local.__func__, SqliteEventLogStorage._initdb

    def from_local(cls, base_dir, inst_data=None):
        if not any((Path(base_dir) / name).exists() for name in ("history", "schedules")):
            shutil.copytree(storage, base_dir, dirs_exist_ok=True)
        return open_storage(cls, base_dir, inst_data)

    def log_of_a_run(self, engine, for_index_shard=False):
        path = Path(engine.url.database)
        if not for_index_shard and not path.exists():
            copy = path.with_name(f"{path.name}.{os.getpid()}")
            shutil.copyfile(run, copy)
            with contextlib.suppress(FileExistsError):  # another process may be as far
                os.link(copy, path)
            copy.unlink()
        make_log(self, engine, for_index_shard)

    DagsterSqliteStorage.from_local = classmethod(from_local)
    SqliteEventLogStorage._initdb = log_of_a_run


def _new_storage(folder):
    """A storage as Dagster makes it, with the log of one run."""
    from dagster._core.storage.sqlite_storage import DagsterSqliteStorage

    made = DagsterSqliteStorage.from_local(str(folder))
    with made.event_log_storage.run_connection("a-run"):
        pass
    made.dispose()
    return folder
