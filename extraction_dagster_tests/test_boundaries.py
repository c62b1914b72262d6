"""Who may import what: seen from fresh interpreters, not from the source text."""

import json
import subprocess
import sys
import textwrap

import extraction_dagster

DAEMONS = "dagster._daemon"  # half a CPU second for whoever runs no daemon
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


def test_the_package_says_its_version():
    assert extraction_dagster.__version__ == "0.1.0"
