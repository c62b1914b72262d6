"""What lies in deploy/: held against the schemas of its formats, the settings, the pins and what is promised of it."""

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import extraction_dagster
from extraction_dagster.settings import PREFIX, Settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in sorted(DEPLOY.rglob("*"))
    if path.is_file() and path.parent.name not in {"grafana", "prometheus"}
}
DOCKERFILE = TEXTS["deploy/Dockerfile"]
COMPOSE = yaml.safe_load(TEXTS["deploy/compose.yaml"])
HELM = yaml.safe_load(TEXTS["deploy/helm/values.yaml"])
UNITS = [name for name in TEXTS if name.endswith(".service")]
OUR_PARTS = ("code-location", "webserver", "daemon")
DIGEST = r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}"
SECRET = {name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)}


def pin(name):
    return re.search(rf"^{name}==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def checked_by(*command):
    done = subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


# Formats


def test_hadolint_finds_nothing_in_the_dockerfile():
    checked_by("hadolint", "deploy/Dockerfile")


def test_the_compose_file_fits_the_schema_of_compose():
    checked_by("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "deploy/compose.yaml")


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_runs_a_program_that_is_installed_and_stops_in_its_own_time(unit):
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str
    parser.read_string(TEXTS[unit])
    assert parser.sections() == ["Unit", "Service", "Install"]
    service = parser["Service"]
    program = Path(service["ExecStart"].split()[0])
    assert program.parent == Path("/srv/extraction/.venv/bin")
    assert (BIN / program.name).exists()
    assert service["User"] == "extraction"
    assert service["NoNewPrivileges"] == "yes"
    # torch generates code, and the cage needs its own calls
    assert "MemoryDenyWriteExecute" not in service
    assert {"landlock_restrict_self", "seccomp"} <= set(service["SystemCallFilter"].split())
    stops = {"code": ("control-group", "120"), "webserver": ("mixed", "30"), "daemon": ("mixed", "60")}
    assert (service["KillMode"], service["TimeoutStopSec"]) == stops[Path(unit).stem.removeprefix("extraction-")]
    if shutil.which("systemd-analyze"):
        verify_with_systemd(unit, parser)


def verify_with_systemd(unit, parser):
    """What systemd itself says to the options; it would look for the program and the account as well."""
    parser["Service"]["ExecStart"] = "/bin/true"
    folder = Path.cwd()  # a test's own
    with (folder / Path(unit).name).open("w") as file:
        parser.write(file, space_around_delimiters=False)
    command = ["systemd-analyze", "verify", "--man=no", folder / Path(unit).name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if Path(unit).name in line]
    assert said == []


def pods():
    """Of each part of the values that becomes a pod: its name, the pod's context, the rest of the part."""
    (code,) = HELM["dagster-user-deployments"]["deployments"]
    launcher = HELM["runLauncher"]["config"]["k8sRunLauncher"]
    yield "code location", code["podSecurityContext"], code
    yield "webserver", HELM["dagsterWebserver"]["podSecurityContext"], HELM["dagsterWebserver"]
    yield "daemon", HELM["dagsterDaemon"]["podSecurityContext"], HELM["dagsterDaemon"]
    yield "runs", launcher["runK8sConfig"]["podSpecConfig"]["securityContext"], {**code, **launcher}


@pytest.mark.parametrize(("context", "part"), [pod[1:] for pod in pods()], ids=[pod[0] for pod in pods()])
def test_a_pod_of_the_values_is_one_that_kubernetes_knows_and_has_no_right(context, part):
    from dagster_k8s.models import k8s_model_from_dict, k8s_snake_case_dict  # noqa: PLC0415
    from kubernetes.client import V1PodSpec  # noqa: PLC0415 - two seconds that the other tests need not wait for

    probes = {name: part[name] for name in ("readinessProbe", "livenessProbe", "startupProbe") if name in part}
    probes = {name: {key: value for key, value in probe.items() if key != "enabled"} for name, probe in probes.items()}
    container = {
        "name": "x",
        "securityContext": part["securityContext"],
        "volumeMounts": part["volumeMounts"],
        **probes,
    }
    container["resources"] = part["resources"]
    spec = {"containers": [container], "volumes": part["volumes"], "securityContext": context}
    known = k8s_model_from_dict(V1PodSpec, k8s_snake_case_dict(V1PodSpec, spec))  # raises at a key that there is not
    (only,) = known.containers
    assert only.security_context.read_only_root_filesystem is True
    assert only.security_context.allow_privilege_escalation is False
    assert only.security_context.capabilities.drop == ["ALL"]
    assert (known.security_context.run_as_non_root, known.security_context.run_as_user) == (True, 10001)
    assert known.security_context.seccomp_profile.type == "RuntimeDefault"
    assert {mount.mount_path for mount in only.volume_mounts} == {"/tmp", "/data"}  # noqa: S108 - in a container


def test_the_instance_of_the_values_is_that_of_dagster_yaml():
    from dagster._config import validate_config  # noqa: PLC0415, TID251 - the instance is Dagster's
    from dagster._core.instance.config import dagster_instance_config_schema  # noqa: PLC0415, TID251
    from dagster_k8s import K8sRunLauncher  # noqa: PLC0415

    ours, theirs = yaml.safe_load((ROOT / "dagster.yaml").read_text()), HELM["additionalInstanceConfig"]
    checked = validate_config(dagster_instance_config_schema(), theirs)
    assert checked.success, checked.errors
    for part in ("run_retries", "freshness", "nux", "local_artifact_storage"):
        assert theirs[part] == ours[part]
    assert theirs["concurrency"].keys() == ours["concurrency"].keys()
    assert theirs["concurrency"]["pools"]["granularity"] == ours["concurrency"]["pools"]["granularity"]
    daemon = HELM["dagsterDaemon"]
    assert daemon["runRetries"] == {"enabled": False}  # or the chart would write the key a second time
    freed = ours["run_monitoring"]["free_slots_after_run_end_seconds"]
    assert (daemon["runMonitoring"]["enabled"], daemon["runMonitoring"]["freeSlotsAfterRunEndSeconds"]) == (True, freed)
    kept = HELM["retention"]["sensor"]["purgeAfterDays"]
    assert kept == {**ours["retention"]["sensor"]["purge_after_days"], "started": 90}
    assert HELM["pythonLogs"]["managedPythonLoggers"] == ours["python_logs"]["managed_python_loggers"]
    launcher = HELM["runLauncher"]["config"]["k8sRunLauncher"]
    parts = {re.sub("([A-Z])", r"_\1", name).lower(): part for name, part in launcher["runK8sConfig"].items()}
    config = {
        "instance_config_map": "x",
        "dagster_home": HELM["global"]["dagsterHome"],
        "postgres_password_secret": HELM["global"]["postgresqlSecretName"],
        "image_pull_policy": launcher["imagePullPolicy"],
        "security_context": launcher["securityContext"],
        "run_k8s_config": parts,
    }
    checked = validate_config(K8sRunLauncher.config_type(), config)
    assert checked.success, checked.errors


# Names


@pytest.mark.parametrize("name", TEXTS)
def test_each_setting_that_a_file_names_exists(name):
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    assert set(re.findall(rf"\b{PREFIX}[A-Z0-9_]*[A-Z0-9]\b", TEXTS[name])) <= known


def test_the_settings_of_the_values_are_possible_ones(monkeypatch):
    from extraction_dagster.settings import load_settings  # noqa: PLC0415 - beside what it is for

    commented = re.findall(r"^ +# (EXTRACTION_\w+): (.*)$", TEXTS["deploy/helm/values.yaml"], re.MULTILINE)
    offered = {name: yaml.safe_load(value) for name, value in commented}
    (settings,) = [part["data"] for part in HELM["extraManifests"] if part["kind"] == "ConfigMap"]
    for variable, value in {**settings, **offered}.items():
        assert isinstance(value, str)
        monkeypatch.setenv(variable, value)
    assert load_settings().run_gpus == 1
    assert len(offered) == 4


def test_each_image_of_others_is_named_by_its_digest():
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)[2:] == ["base"] * 4
    froms = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)[:2]
    compose = [part["image"] for name, part in COMPOSE["services"].items() if name not in OUR_PARTS]
    helm = [
        f"{image['repository']}:{image['tag']}" for image in (HELM["postgresql"]["image"], HELM["busybox"]["image"])
    ]
    used = [*froms, *compose, *helm]
    assert [image for image in used if not re.fullmatch(DIGEST, image.replace("docker.io/library/", ""))] == []
    assert len({image.partition("@")[2] for image in used if "postgres" in image}) == 1
    ci = (ROOT / ".github/workflows/ci.yml").read_text()
    assert COMPOSE["services"]["qdrant"]["image"] in ci


def test_versions_are_those_of_the_project_and_of_its_pins():
    assert re.findall(r"--version (\S+)", TEXTS["deploy/helm/values.yaml"]) == [pin("dagster")]
    ours = re.findall(r"extraction-dagster:(\d[\w.]*?)(?:-|\s|$)", DOCKERFILE + TEXTS["deploy/compose.yaml"])
    assert {*ours, HELM["dagsterWebserver"]["image"]["tag"]} == {extraction_dagster.__version__}
    extras = re.search(r"^ARG EXTRAS=(\S+)", DOCKERFILE, re.MULTILINE)[1].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"k8s", *extras} <= set(project["optional-dependencies"])


def test_no_file_holds_a_secret():
    for name, text in TEXTS.items():
        assert not re.search(r"://[^/\s:@]+:[^/\s@]+@", text), name
        given = re.findall(rf"^\s*-?\s*(?:Environment=)?{PREFIX}(\w+)\s*[:=]\s*\S", text, re.MULTILINE)
        assert SECRET.isdisjoint(field.lower() for field in given), name
        given = re.findall(r"^\s*-?\s*(\w*(?:PASSWORD|API_KEY|TOKEN|SECRET)\w*)\s*[:=]\s*\S", text, re.MULTILINE)
        assert given == [], name


# What is promised of a deployment


def stages():
    """The stages of the Dockerfile by name."""
    parts = re.split(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_image_runs_as_a_number_and_writes_only_to_tmp_and_home():
    base = stages()["base"]
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["10001:10001"]
    assert "EXTRACTION_HOME=/data/home" in base
    assert " HOME=/tmp" in base
    assert 'VOLUME ["/data"]' in base
    assert list(stages()) == ["build", "base", "webserver", "daemon", "code-location", "run-worker"]


@pytest.mark.parametrize("stage", ["webserver", "daemon", "code-location", "run-worker"])
def test_each_way_to_start_is_a_program_that_is_installed(stage):
    command = re.search(r'^CMD \["([\w-]+)"', stages()[stage], re.MULTILINE)[1]
    assert (BIN / command).exists()
    assert ("HEALTHCHECK NONE" in stages()[stage]) == (stage == "run-worker")


def test_only_what_the_image_is_built_of_is_sent_to_the_builder():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!").rstrip("/") for line in lines if line.startswith("!")}
    assert lines[1] == "*"
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == kept
    assert all((ROOT / source).exists() for source in kept)


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_has_no_right_and_says_how_it_is(name):
    service = COMPOSE["services"][name]
    assert (service["read_only"], service["cap_drop"], service["init"]) == (True, ["ALL"], True)
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    if name in OUR_PARTS:
        assert "HEALTHCHECK --interval" in stages()[service["build"]["target"]]
    else:
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["networks"] == ["stores"]
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:")


def test_workspaces_name_one_code_location():
    theirs, ours = (yaml.safe_load(path.read_text()) for path in (DEPLOY / "workspace.yaml", ROOT / "workspace.yaml"))
    (server,), (module,) = theirs["load_from"], ours["load_from"]
    assert server["grpc_server"]["location_name"] == module["python_module"]["location_name"]
    host = server["grpc_server"]["host"]["env"]
    assert COMPOSE["services"]["daemon"]["environment"][host] == "code-location"
    assert all(f"{host}=127.0.0.1" in TEXTS[unit] for unit in UNITS)
