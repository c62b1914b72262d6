"""Who may import what: seen from fresh interpreters, not from the source text."""

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import extraction_dagster

DAEMONS = "dagster._daemon"  # half a CPU second for whoever runs no daemon
PRIVATE_API = "defs/instance/private_api.py"  # where Dagster's private modules and storages may be used
STORAGES = {"event_log_storage", "run_storage", "schedule_storage", "daemon_cursor_storage"}
HEAVY = ["torch", "decord", "av", "qdrant_client", "qdrant_edge", "cv2"]


def run_python(code):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_everything_outside_the_dagster_room_imports_with_dagster_blocked():
    imported = run_python("""
        import importlib, json, pkgutil, sys
        import extraction_dagster

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("dagster", "dagster_postgres", "dagster_shared", "dagster_webserver"):
                    raise ImportError(f"{name} is blocked")

        def refuse(name):
            raise ImportError(name)

        sys.meta_path.insert(0, Block())
        room = ("extraction_dagster.defs", "extraction_dagster.definitions")
        names = []
        for found in pkgutil.walk_packages(extraction_dagster.__path__, "extraction_dagster.", refuse):
            if not found.name.startswith(room):
                importlib.import_module(found.name)
                names.append(found.name)
        print(json.dumps(names))
    """)
    assert {"extraction_dagster.records", "extraction_dagster.demo.videos"} <= set(imported)
    assert not [name for name in imported if name.startswith("extraction_dagster.defs")]


def test_the_definitions_load_without_any_heavy_package():
    loaded = run_python(f"""
        import json, sys
        import extraction_dagster.definitions
        print(json.dumps([name for name in {[*HEAVY, DAEMONS]!r} if name in sys.modules]))
    """)
    assert loaded == []


def test_the_rooms_load_without_any_heavy_package():
    loaded = run_python(f"""
        import importlib, json, pkgutil, sys
        import extraction_dagster.stages
        for found in pkgutil.walk_packages(extraction_dagster.stages.__path__, "extraction_dagster.stages."):
            importlib.import_module(found.name)
        print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
    """)
    assert loaded == []


def uses_of_dagsters_private_parts(tree):
    """Imports from modules of an underscore, and attributes that are a storage of the instance."""
    for node in ast.walk(tree):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in modules:
            package, *rest = name.split(".")
            if package == "dagster_shared" or (package.startswith("dagster") and any(part[0] == "_" for part in rest)):
                yield name
        if isinstance(node, ast.Attribute) and node.attr in STORAGES:
            yield node.attr


def test_dagsters_private_parts_are_used_in_one_file():
    folder = Path(extraction_dagster.__file__).parent
    found = {
        path.relative_to(folder).as_posix(): names
        for path in folder.rglob("*.py")
        if (names := sorted(uses_of_dagsters_private_parts(ast.parse(path.read_text()))))
    }
    assert found.pop(PRIVATE_API)
    assert found == {}


def test_the_package_says_its_version():
    assert extraction_dagster.__version__ == "0.1.0"
