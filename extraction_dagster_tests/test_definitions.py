"""The door: short enough to read, and accepted by Dagster's own tools without a warning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from extraction_dagster.defs.instance.glance import template

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def check(*command, cwd, home):
    (home / "dagster.yaml").write_text(template("dagster.yaml"))
    quiet = {"DAGSTER_HOME": str(home), "DAGSTER_DG_UPDATE_CHECK_ENABLED": "0", "NO_COLOR": "1"}
    quiet["VIRTUAL_ENV"] = sys.prefix  # as 'activate' sets it: dg warns when it is not the project's own
    done = subprocess.run(
        [BIN / command[0], *command[1:]],
        cwd=cwd,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    own = "SupersessionWarning: Function `definitions_validate_command`"  # of Dagster, about its own command
    assert [line for line in said.splitlines() if "warning" in line.lower() and own not in line] == []
    return said


def test_the_definitions_fit_a_page():
    assert len((ROOT / "extraction_dagster" / "definitions.py").read_text().splitlines()) <= 60


@pytest.mark.slow
def test_dagster_accepts_the_definitions_of_the_workspace(tmp_path):
    (tmp_path / "workspace.yaml").write_text(template("workspace.yaml"))
    said = check("dagster", "definitions", "validate", "-w", "workspace.yaml", cwd=tmp_path, home=tmp_path)
    assert "All code locations passed validation." in said


@pytest.mark.slow
def test_dg_finds_the_project_and_accepts_its_definitions(tmp_path):
    assert "All definitions loaded successfully." in check("dg", "check", "defs", cwd=ROOT, home=tmp_path)
