"""What is installed and what builds it is known by its content, not by its name alone."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def pins(text):
    return {(re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in PIN.findall(text)}


def test_every_pin_has_its_hashes():
    constraints, requirements = ((ROOT / name).read_text() for name in ("constraints.txt", "requirements.txt"))
    assert pins(requirements) == pins(constraints), "run 'bash .ci/lock' after a change of constraints.txt"
    entries = re.split(r"^(?=[A-Za-z0-9])", requirements, flags=re.MULTILINE)[1:]
    without = [entry.split()[0] for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry)]
    assert without == []
    odd = [
        line
        for line in requirements.splitlines()
        if not re.fullmatch(r"#.*|\S+==\S+( ; .*)? \\|    --hash=\S+( \\)?", line)
    ]
    assert odd == []  # no index, no link, no other file


def test_torchs_cpu_build_is_known_too():
    (known,) = re.findall(
        r"^# torch (--hash=sha256:[0-9a-f]{64})$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    (torch,) = re.findall(r"^torch==.*?(?=^\S)", (ROOT / "requirements.txt").read_text(), re.MULTILINE | re.DOTALL)
    assert known in torch


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_and_images_are_named_by_digest(workflow):
    text = workflow.read_text()
    actions = re.findall(r"uses: (.*)", text)
    assert actions
    assert [used for used in actions if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", used)] == []
    images = re.findall(r"image: (.*)", text)
    assert [image for image in images if not re.fullmatch(r"\S+:v[\d.]+@sha256:[0-9a-f]{64}", image)] == []


def test_an_audit_that_could_audit_nothing_fails():
    (call,) = re.findall(r"run: (pip-audit .*)", (ROOT / ".github/workflows/audit.yml").read_text())
    assert {"--strict", "--require-hashes"} <= set(call.split())
