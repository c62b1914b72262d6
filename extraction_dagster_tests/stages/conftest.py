"""A real S3 API on this machine, for what is read from buckets and what is kept in them."""

import threading
import uuid

import pytest
import werkzeug.serving


@pytest.fixture(scope="session")
def s3_address():
    """An S3 API in this process; a fault while it starts is raised, never waited out."""
    from moto.server import DomainDispatcherApplication, create_backend_app  # noqa: PLC0415 - lazy: slow to import

    application = DomainDispatcherApplication(create_backend_app)
    server = werkzeug.serving.make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(30)


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


@pytest.fixture
def no_longer_than_minutes():
    """Kills a process that is still there after two minutes, so that whatever waits for it ends."""
    timers = []

    def limit(process):
        timers.append(threading.Timer(120, process.kill))
        timers[-1].daemon = True
        timers[-1].start()

    yield limit
    for timer in timers:
        timer.cancel()
