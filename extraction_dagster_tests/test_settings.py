"""Settings from the environment and .env: what is read, what is refused, what is never shown."""

import contextlib
from datetime import timedelta
from pathlib import Path

import pytest

from extraction_dagster.errors import SettingsError
from extraction_dagster.settings import RETIRED, Settings, load_settings


def test_defaults_run_everything_embedded_under_one_home(tmp_path):
    settings = load_settings()
    assert settings.home == tmp_path / ".extraction"
    assert settings.resolved_source_url == f"sqlite:///{tmp_path}/.extraction/source.db"
    assert settings.resolved_state_url == settings.resolved_source_url
    assert settings.resolved_frames_uri == f"{tmp_path}/.extraction/frames"
    assert settings.resolved_embeddings_uri == f"{tmp_path}/.extraction/embeddings"
    assert settings.resolved_allowed_roots == (tmp_path / ".extraction" / "videos",)
    assert (settings.qdrant_url, settings.batch_size, settings.decoder) == (None, 1000, "pyav")


def test_the_environment_wins_over_the_env_file(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("EXTRACTION_BATCH_SIZE=5\nEXTRACTION_FPS=2\nOTHER=1\n")
    monkeypatch.setenv("EXTRACTION_BATCH_SIZE", "7")
    settings = load_settings()
    assert (settings.batch_size, settings.fps) == (7, 2.0)


def test_the_state_follows_the_source_unless_it_is_set(settings):
    assert settings(source_url="sqlite:////a.db").resolved_state_url == "sqlite:////a.db"
    assert settings(source_url="sqlite:////a.db", state_url="sqlite:////b.db").resolved_state_url == "sqlite:////b.db"


def test_lists_are_written_with_commas(monkeypatch):
    monkeypatch.setenv("EXTRACTION_SOURCE_PAYLOAD_COLUMNS", "title, likes,")
    monkeypatch.setenv("EXTRACTION_ALLOWED_ROOTS", "/a,/b")
    settings = load_settings()
    assert settings.source_payload_columns == ("title", "likes")
    assert settings.resolved_allowed_roots == (Path("/a"), Path("/b"))


@pytest.mark.parametrize("column", ["PLATFORM", "CODE", "EXTRACTED", "EMBEDDED"])
def test_an_empty_optional_column_means_none(monkeypatch, column):
    monkeypatch.setenv(f"EXTRACTION_SOURCE_{column}_COLUMN", "")
    assert getattr(load_settings(), f"source_{column.lower()}_column") is None


@pytest.mark.parametrize("name", ["QDRANT_URL", "BATCH_SIZE", "HOME", "POSTGRES_URL", "ALLOWED_ROOTS"])
def test_any_other_empty_value_counts_as_unset(monkeypatch, name):
    monkeypatch.setenv(f"EXTRACTION_{name}", "")
    assert getattr(load_settings(), name.lower()) == getattr(Settings(), name.lower())


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "https://user:canary-77@q:6333",
            "an address without user, password or query: the key belongs into",
        ),
        ("https://q:6333/?api-key=canary-77", "an address without user, password or query: the key belongs into EXTR"),
        ("q:6333", "an address such as http://localhost:6333 or"),
    ],
)
def test_a_server_address_holds_no_secret_and_is_not_shown_when_it_does(monkeypatch, url, expected):
    monkeypatch.setenv("EXTRACTION_QDRANT_URL", url)
    with pytest.raises(SettingsError, match=rf"^Setting EXTRACTION_QDRANT_URL is .*, expected {expected}") as caught:
        load_settings()
    assert "canary-77" not in str(caught.value)


def test_a_column_that_every_point_has_is_refused_at_the_start(monkeypatch):
    monkeypatch.setenv("EXTRACTION_SOURCE_PAYLOAD_COLUMNS", "likes,path,record_id")
    with pytest.raises(SettingsError, match=r"'likes,path,record_id', expected .*\(refused: path, record_id\)"):
        load_settings()


def test_an_unknown_variable_is_refused_with_the_likely_name(monkeypatch):
    monkeypatch.setenv("EXTRACTION_BATCHSIZE", "5")
    with pytest.raises(
        SettingsError, match=r"^Setting EXTRACTION_BATCHSIZE is unknown, expected EXTRACTION_BATCH_SIZE, perhaps\. "
    ):
        load_settings()


@pytest.fixture
def warned(monkeypatch):
    """The settings that were warned of, none at first."""
    told = set()
    monkeypatch.setattr("extraction_dagster.settings._warned", told)
    return told


def test_a_setting_that_is_gone_is_warned_of_once_and_has_no_effect(monkeypatch, tmp_path, caplog, warned):
    before = load_settings()
    monkeypatch.setenv("EXTRACTION_FETCH_ATTEMPTS", "9")
    (tmp_path / ".env").write_text("EXTRACTION_VECTOR_DTYPE=float32\n")

    assert load_settings() == load_settings() == before

    fetch, vectors = caplog.messages
    assert fetch == (
        "Setting EXTRACTION_FETCH_ATTEMPTS is gone and has no effect: a download is tried 4 times before its record "
        "fails. Remove it from the environment and from .env; the next release refuses it."
    )
    assert vectors.startswith("Setting EXTRACTION_VECTOR_DTYPE is gone and has no effect: a new collection keeps ")
    assert warned == {"fetch_attempts", "vector_dtype"}


@pytest.mark.parametrize("name", sorted(set(RETIRED) - {"compile=on"}))
def test_every_setting_that_is_gone_has_no_field(monkeypatch, caplog, warned, name):
    assert name not in Settings.model_fields
    monkeypatch.setenv(f"EXTRACTION_{name.upper()}", "1")
    load_settings()
    assert [*warned] == [name]
    assert len(caplog.messages) == 1


@pytest.mark.usefixtures("warned")
@pytest.mark.parametrize("where", ["environment", ".env"])
def test_a_value_that_is_gone_is_warned_of_and_means_off(monkeypatch, tmp_path, caplog, where):
    if where == ".env":
        (tmp_path / ".env").write_text("EXTRACTION_COMPILE=on\n")
    else:
        monkeypatch.setenv("EXTRACTION_COMPILE", "on")

    assert [load_settings().compile, load_settings().compile] == ["off", "off"]

    (message,) = caplog.messages
    assert message == (
        "Setting EXTRACTION_COMPILE=on is gone and has no effect: runs as off, with the same vectors; onnxruntime "
        "compiles without a C++ compiler. Remove it from the environment and from .env; the next release refuses it."
    )


def test_an_unknown_line_of_the_env_file_is_refused_too(tmp_path):
    (tmp_path / ".env").write_text("EXTRACTION_QRANT_URL=http://localhost\n")
    with pytest.raises(SettingsError, match="EXTRACTION_QRANT_URL is unknown, expected EXTRACTION_QDRANT_URL"):
        load_settings()


def test_an_env_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / ".env").write_bytes(b"EXTRACTION_FPS=\xff\xfe\n")
    with pytest.raises(SettingsError, match=r"Setting file \.env is unreadable \(UnicodeDecodeError\)"):
        load_settings()


def test_variables_of_the_tests_are_no_settings(monkeypatch):
    monkeypatch.setenv("EXTRACTION_TEST_ANYTHING", "1")
    load_settings()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("BATCH_SIZE", "0", "is '0', expected Input should be greater than or equal to 1"),
        ("BATCH_SIZE", "many", "is 'many', expected Input should be a valid integer"),
        ("DECODER", "cv2", "is 'cv2', expected Input should be 'pyav' or 'decord'"),
        ("DEVICE", "gpu", "is 'gpu', expected String should match pattern"),
        ("FPS", "nan", "is 'nan', expected Input should be "),
        ("SOURCE_READ_ONLY", "maybe", "is 'maybe', expected Input should be a valid boolean"),
        ("COLLECTION_NAME", "a/b", "is 'a/b', expected String should match pattern"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_what_was_expected(monkeypatch, name, value, sentence):
    monkeypatch.setenv(f"EXTRACTION_{name}", value)
    with pytest.raises(SettingsError, match=f"^Setting EXTRACTION_{name} {sentence}"):
        load_settings()


def test_a_read_only_source_needs_its_state_elsewhere(monkeypatch):
    monkeypatch.setenv("EXTRACTION_SOURCE_READ_ONLY", "true")
    with pytest.raises(SettingsError, match="is not consistent, expected source_read_only needs state_url"):
        load_settings()
    monkeypatch.setenv("EXTRACTION_STATE_URL", "sqlite:///state.db")
    assert load_settings().source_read_only is True


@pytest.mark.parametrize("name", ["SOURCE_URL", "STATE_URL", "POSTGRES_URL", "QDRANT_API_KEY"])
def test_a_secret_is_never_shown(monkeypatch, name):
    monkeypatch.setenv(f"EXTRACTION_{name}", "postgresql://u:canary-4711@db/x")
    settings = load_settings()
    assert getattr(settings, name.lower()).get_secret_value() == "postgresql://u:canary-4711@db/x"
    for shown in (repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert "canary" not in shown


def test_settings_do_not_change_after_they_were_read(settings):
    with pytest.raises(ValueError, match="Instance is frozen"):
        settings().batch_size = 2


def test_where_files_may_come_from_is_a_list_that_is_empty_at_first(monkeypatch):
    nothing = load_settings()
    assert (nothing.allowed_hosts, nothing.allowed_buckets, nothing.allowed_networks) == ((), (), ())
    assert nothing.allow_http is False
    monkeypatch.setenv("EXTRACTION_ALLOWED_HOSTS", "Media.example.com:8443, *.cdn.example.com,[fd00::1]")
    monkeypatch.setenv("EXTRACTION_ALLOWED_BUCKETS", "s3://videos,gs://more_videos")
    monkeypatch.setenv("EXTRACTION_ALLOWED_NETWORKS", "10.1.0.0/16,fd00::1/128")
    settings = load_settings()
    assert settings.allowed_hosts == ("media.example.com:8443", "*.cdn.example.com", "[fd00::1]")
    assert settings.allowed_buckets == ("s3://videos", "gs://more_videos")
    assert settings.allowed_networks == ("10.1.0.0/16", "fd00::1/128")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALLOWED_HOSTS", "*"),
        ("ALLOWED_HOSTS", "*.com"),
        ("ALLOWED_HOSTS", "https://media.example.com"),
        ("ALLOWED_HOSTS", "media.example.com/videos"),
        ("ALLOWED_HOSTS", "a.*.example.com"),
        ("ALLOWED_BUCKETS", "videos"),
        ("ALLOWED_BUCKETS", "s3://*"),
        ("ALLOWED_BUCKETS", "s3://videos/*"),
        ("ALLOWED_NETWORKS", "0.0.0.0/0"),
        ("ALLOWED_NETWORKS", "::/0"),
        ("ALLOWED_NETWORKS", "10.1.2.3/16"),
        ("ALLOWED_NETWORKS", "everything"),
    ],
)
def test_a_list_that_would_allow_everything_or_nothing_meant_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(f"EXTRACTION_{name}", value)
    with pytest.raises(SettingsError, match=rf"^Setting EXTRACTION_{name} is .* such as .*\(refused: "):
        load_settings()


def test_the_owners_are_teams_and_addresses(monkeypatch):
    assert load_settings().owners == ("team:extraction",)
    monkeypatch.setenv("EXTRACTION_OWNERS", "team:video, someone@example.com")
    assert load_settings().owners == ("team:video", "someone@example.com")
    monkeypatch.setenv("EXTRACTION_OWNERS", "team:video,somebody")
    with pytest.raises(SettingsError, match=r"expected owners such as team:video .* \(refused: somebody\)"):
        load_settings()


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        (None, "sqlite"),
        ("postgresql+psycopg2://u:p@h/d", "postgresql"),
        ("PostgreSQL://h/d", "postgresql"),
        ("://", "sql"),
    ],
)
def test_the_kind_of_the_source_follows_from_its_url(settings, url, kind):
    assert settings(source_url=url).source_kind == kind


@pytest.mark.parametrize("name", ["FRAMES_URI", "EMBEDDINGS_URI"])
def test_a_place_of_shards_holds_no_password_and_none_is_shown(monkeypatch, name):
    for value in ("sftp://me:canary-77@host/frames", "simplecache::ftp://me:canary-77@host/x", "s3://a:canary-77@b/c"):
        monkeypatch.setenv(f"EXTRACTION_{name}", value)
        with pytest.raises(SettingsError, match=f"EXTRACTION_{name} .* an address without a password") as refused:
            load_settings()
        assert "canary" not in str(refused.value)
    for value in ("s3://bucket/frames", "sftp://me@host/frames", "/data/a:b@c/frames", "simplecache::s3://bucket/x"):
        monkeypatch.setenv(f"EXTRACTION_{name}", value)
        assert getattr(load_settings(), name.lower()) == value


def test_a_key_goes_unencrypted_to_this_machine_alone_unless_that_is_meant(monkeypatch):
    monkeypatch.setenv("EXTRACTION_QDRANT_API_KEY", "canary-77")
    for url in ("http://localhost:6333", "http://127.0.0.1:6333", "http://[::1]:6333", "https://q.example.com:6333"):
        monkeypatch.setenv("EXTRACTION_QDRANT_URL", url)
        assert load_settings().qdrant_url == url
    monkeypatch.setenv("EXTRACTION_QDRANT_URL", "http://q.example.com:6333")
    with pytest.raises(SettingsError, match="qdrant_url must be https where there is a qdrant_api_key") as refused:
        load_settings()
    assert "canary" not in str(refused.value)
    monkeypatch.setenv("EXTRACTION_QDRANT_ALLOW_HTTP", "true")
    assert load_settings().qdrant_allow_http
    monkeypatch.delenv("EXTRACTION_QDRANT_API_KEY")
    monkeypatch.delenv("EXTRACTION_QDRANT_ALLOW_HTTP")
    assert load_settings().qdrant_url == "http://q.example.com:6333"


def test_buckets_take_folders_and_networks_take_hosts(monkeypatch):
    monkeypatch.setenv("EXTRACTION_ALLOWED_BUCKETS", "s3://videos/2026/,gs://all")
    monkeypatch.setenv(
        "EXTRACTION_ALLOWED_NETWORKS", "Media.example.com=10.1.0.0/16,*.cdn.example.com=fd00::/64,10.2.0.0/16"
    )
    settings = load_settings()
    assert settings.allowed_buckets == ("s3://videos/2026/", "gs://all")
    assert settings.allowed_networks == ("media.example.com=10.1.0.0/16", "*.cdn.example.com=fd00::/64", "10.2.0.0/16")
    for wrong in ("a b=10.1.0.0/16", "=10.1.0.0/16", "host=", "host=10.0.0.0/7", "host"):
        monkeypatch.setenv("EXTRACTION_ALLOWED_NETWORKS", wrong)
        with pytest.raises(SettingsError, match="networks such as"):
            load_settings()


@pytest.mark.parametrize("shape", ["a", "'", '"', "\\", "$", "${", "#", " ", "=", "a=", "export "])
def test_a_line_of_the_env_file_takes_no_time_however_long_it_is(tmp_path, shape, least_seconds):
    def load():
        with contextlib.suppress(SettingsError):
            load_settings()

    for length in (4_000, 1_000_000):
        (tmp_path / ".env").write_text(f"OTHER={shape * (length // len(shape))}\n")
        assert least_seconds(load) < 3
    with pytest.raises(SettingsError, match=r"Setting file \.env is with a line of \d+ bytes, expected at most 8192"):
        load_settings()


def test_what_kubernetes_puts_into_every_pod_is_no_setting(monkeypatch):
    for name, value in {
        "EXTRACTION_QDRANT_SERVICE_HOST": "10.0.0.1",
        "EXTRACTION_QDRANT_SERVICE_PORT": "6333",
        "EXTRACTION_QDRANT_SERVICE_PORT_HTTP": "6333",
        "EXTRACTION_QDRANT_PORT": "tcp://10.0.0.1:6333",
        "EXTRACTION_QDRANT_PORT_6333_TCP": "tcp://10.0.0.1:6333",
        "EXTRACTION_QDRANT_PORT_6333_TCP_ADDR": "10.0.0.1",
        "EXTRACTION_SERVICE_HOST": "10.0.0.2",
        "EXTRACTION_PORT_3000_TCP_PROTO": "tcp",
        "EXTRACTION_QDRANT_GRPC_SERVICE_HOST": "10.0.0.3",
        "EXTRACTION_QDRANT_GRPC_PORT": "tcp://10.0.0.3:6334",
    }.items():
        monkeypatch.setenv(name, value)
    assert load_settings().qdrant_grpc_port == 6334
    monkeypatch.delenv("EXTRACTION_QDRANT_SERVICE_HOST")
    with pytest.raises(SettingsError, match=r"EXTRACTION_QDRANT_.*is unknown"):
        load_settings()


@pytest.mark.parametrize("name", ["EXTRATION_BATCH_SIZE", "EXTRACTON_SOURCE_URL", "EXTRACTIONS_HOME"])
def test_a_slip_in_the_prefix_is_named_where_it_stands_in_the_env_file(name, tmp_path):
    (tmp_path / ".env").write_text(f"{name}=1\nPOSTGRES_HOME=1\nFEATURE_EXTRACTION_URL=2\n")
    right = f"EXTRACTION_{name.partition('_')[2]}"
    with pytest.raises(SettingsError, match=rf"{name} is unknown \(in \.env\), expected {right}, perhaps"):
        load_settings()


@pytest.mark.parametrize("url", ["http://q:canary-77/x", "http://u:canary-77/s@q:6333", "http://[canary-77:6333"])
def test_a_servers_address_with_an_odd_port_is_refused_in_our_own_words(url, monkeypatch):
    monkeypatch.setenv("EXTRACTION_QDRANT_URL", url)
    with pytest.raises(SettingsError, match=r"EXTRACTION_QDRANT_URL is .*expected an address such as") as told:
        load_settings()
    assert ("canary" in str(told.value)) == ("@" not in url)


@pytest.mark.parametrize(
    ("text", "kept_for"),
    [("90", timedelta(days=90)), ("7d", timedelta(days=7)), ("12h", timedelta(hours=12)), ("all", None)],
)
def test_runs_are_kept_for_days_or_hours_or_for_ever(text, kept_for):
    assert Settings(keep_runs=text).runs_kept_for == kept_for


@pytest.mark.parametrize("text", ["0", "0h", "-1", "30m", "none", "1.5"])
def test_a_time_to_keep_runs_that_is_none_is_refused(text, monkeypatch):
    monkeypatch.setenv("EXTRACTION_KEEP_RUNS", text)
    with pytest.raises(SettingsError, match=f"EXTRACTION_KEEP_RUNS is '{text}', expected"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RUN_CPU", "4"),
        ("RUN_CPU", "0.5"),
        ("RUN_CPU", "500m"),
        ("RUN_MEMORY", "8Gi"),
        ("RUN_MEMORY", "1.5G"),
        ("RUN_NODE_SELECTOR", '{"cloud.google.com/gke-accelerator": "nvidia-l4", "spot": ""}'),
        ("RUN_TOLERATIONS", '[{"operator": "Exists"}, {"key": "gpu", "value": "yes", "effect": "NoSchedule"}]'),
        ("RUN_TOLERATIONS", '[{"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}]'),
        ("RUN_QUEUE", "video-frames"),
    ],
)
def test_what_kubernetes_takes_for_a_pod_is_kept_as_it_is(monkeypatch, name, value):
    monkeypatch.setenv(f"EXTRACTION_{name}", value)
    assert getattr(load_settings(), name.lower()) == value


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RUN_CPU", "0", "cores such as 4, 1.5 or 500m"),
        ("RUN_CPU", "four", "cores such as"),
        ("RUN_CPU", "-1", "cores such as"),
        ("RUN_MEMORY", "8", "bytes with their unit, such as 8Gi"),
        ("RUN_MEMORY", "8GB", "bytes with their unit"),
        ("RUN_MEMORY", "0Gi", "bytes with their unit"),
        ("RUN_GPUS", "0", "Input should be greater than or equal to 1"),
        ("RUN_NODE_SELECTOR", "pool=gpu", r"JSON such as \{\"pool\": \"gpu\"\} \(Invalid JSON"),
        ("RUN_NODE_SELECTOR", '{"pool": 1}', r"JSON such as .* \(pool: Input should be a valid string"),
        ("RUN_NODE_SELECTOR", '{"po ol": "gpu"}', "JSON such as .*String should match pattern"),
        ("RUN_NODE_SELECTOR", "[]", "JSON such as .*an object"),
        ("RUN_TOLERATIONS", '{"key": "gpu"}', "JSON such as .*valid array"),
        ("RUN_TOLERATIONS", '[{"kye": "gpu"}]', r"JSON such as .* \(0\.kye: Extra inputs are not permitted"),
        (
            "RUN_TOLERATIONS",
            '[{"key": "gpu", "operator": "Exists", "value": "x"}]',
            ".*Exists has no value",
        ),
        ("RUN_TOLERATIONS", '[{"value": "x"}]', "JSON such as .*all keys are meant by Exists alone"),
        ("RUN_TOLERATIONS", '[{"key": "gpu", "tolerationSeconds": 5}]', "JSON such as .*belongs to NoExecute"),
        ("RUN_QUEUE", "Video Frames", "the name of a LocalQueue, such as extraction"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_in_one_line(monkeypatch, name, value, expected):
    monkeypatch.setenv(f"EXTRACTION_{name}", value)
    with pytest.raises(SettingsError, match=f"^Setting EXTRACTION_{name} is .*, expected {expected}") as refused:
        load_settings()
    assert "\n" not in str(refused.value)
