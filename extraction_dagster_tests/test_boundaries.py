"""Which file may import what, and how big it is, read from the source; what that loads, seen from fresh interpreters.

The floors of the house, from the ground up; FLOORS says which rooms each one may use:

    errors, records, settings, files …      the ground, for everybody
    stages/catalog
    shards
    stages/decode
    stages/embed     stages/index           ticks      notify      demo
    ranges                                  watch
    defs (with instance/ and definitions)   Dagster
    cli
"""

import ast
import collections
import graphlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import extraction_dagster

GROUND = "the ground"  # extraction_dagster/*.py and errors/
# A room may import the ground, itself and the rooms named here; each of them stands further up in this table, so that
# the rooms have an order. Imports inside functions and for types count as well.
FLOORS = {
    GROUND: (),
    "stages.catalog": (),
    "shards": ("stages.catalog",),
    "stages.decode": ("stages.catalog", "shards"),
    "stages.embed": ("shards", "stages.decode"),
    "stages.index": ("stages.catalog", "shards", "stages.decode"),
    "ranges": ("stages.catalog", "shards", "stages.decode", "stages.embed", "stages.index"),
    "ticks": ("stages.catalog",),
    "watch": ("stages.catalog", "stages.index", "ticks"),
    "notify": (),
    "demo": (),
    "defs": (
        *("stages.catalog", "shards", "stages.decode", "stages.embed", "stages.index"),
        *("ranges", "ticks", "watch", "notify"),
    ),
    "cli": (
        *("stages.catalog", "shards", "stages.decode", "stages.embed", "stages.index"),
        *("ranges", "ticks", "watch", "notify", "demo", "defs"),
    ),
}
# The tidied house had 22,300 lines; each rise of the limit is for something that users were promised since:
# 25,900: claims, sources, addresses, the brake on purging, damage set aside, places that nobody holds for ever; limits,
# rights, outages and states of a Qdrant server.
# 176 files and 32,500: pictures, seconds and streams as a player has them, photos, `preview`; the cage and its reports,
# limits for what rows and shards hold; changed rows by their versions' order; rights, signs of life, MariaDB, `show`.
# 183 files and 35,000: `points import`, moments and examples in a search, Dagster's history, pods of runs, looks at
# Dagster's storage without Dagster, and pictures, times and names of a few dozen more kinds of files.
MOST_FILES, MOST_LINES, MOST_LINES_A_FILE = 183, 35_000, 400
# Folders whose files are named after what they serve, so that a name occurs elsewhere too.
NAMED_AFTER_OTHERS = ("cli", "defs", "errors", "ranges")
# Names that stand for the same part in several rooms: a stage's entry, a store's class, a child process' loop.
SAME_PART = {"__init__.py", "stage.py", "store.py", "worker.py"}

DAEMONS = "dagster._daemon"  # half a CPU second for a process that runs no daemon
PRIVATE_API = "defs/instance/private_api.py"  # where Dagster's private modules and storages may be used
STORAGES = {"event_log_storage", "run_storage", "schedule_storage", "daemon_cursor_storage"}
HEAVY = ["torch", "decord", "av", "qdrant_client", "qdrant_edge", "cv2"]


PACKAGE = Path(extraction_dagster.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def shown(path):
    """A file as one types it: `extraction_dagster/stages/index/stage.py`."""
    return str(path.relative_to(PACKAGE.parent))


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}
LINES = {path: len(path.read_text().splitlines()) for path in FILES}


def room_of(module):
    """`stages.index` of `extraction_dagster.stages.index.edge.store`; None when no room is declared for it."""
    parts = module.split(".")[1:]
    if parts[:1] in ([], ["errors"]) or (len(parts) == 1 and parts[0] not in FLOORS):
        return "defs" if parts == ["definitions"] else GROUND
    return next((name for name in (".".join(parts[:2]), parts[0]) if name in FLOORS), None)


def imports_in(source):
    """Every import of ours in a file, also in functions and under TYPE_CHECKING: `(line, module)`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not read"
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [path if path in MODULES else node.module for path in paths]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] == "extraction_dagster")


IMPORTS = {module: list(imports_in(path.read_text())) for module, path in MODULES.items()}


def refuse(wrong, rule):
    if wrong:
        pytest.fail("\n  ".join([rule, *wrong]), pytrace=False)


def test_imports_in_functions_and_for_types_are_read():
    source = """
        from typing import TYPE_CHECKING
        import extraction_dagster.records as records
        if TYPE_CHECKING:
            from extraction_dagster.stages.index.stage import Indexed
        def go():
            from extraction_dagster import step_progress, __version__
    """
    assert list(imports_in(textwrap.dedent(source))) == [
        (3, "extraction_dagster.records"),
        (5, "extraction_dagster.stages.index.stage"),
        (7, "extraction_dagster.step_progress"),
        (7, "extraction_dagster"),
    ]


def test_the_floors_have_an_order():
    names = list(FLOORS)
    higher = [
        f"{room} names {used}" for room in names for used in FLOORS[room] if used not in names[: names.index(room)]
    ]
    refuse(higher, "A room may name only rooms that stand above it in FLOORS, its text from the ground up.")


def test_every_file_is_in_a_room():
    lost = [shown(path) for module, path in MODULES.items() if module.count(".") > 1 and room_of(module) is None]
    refuse(lost, "These files are in no room: add their folder to FLOORS, with the rooms that it may use.")


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_what_its_floor_allows(room):
    allowed = {GROUND, room, *FLOORS[room]}
    wrong = [
        f"{shown(MODULES[module])}:{line} imports {name} of {room_of(name)}"
        for module, found in IMPORTS.items()
        for line, name in found
        if room_of(module) == room and room_of(name) not in allowed
    ]
    may = ", ".join(FLOORS[room]) or "nothing else"
    refuse(wrong, f"{room} may import the ground and {may}. Move what is needed down, or pass it in as an argument.")


def test_no_files_import_each_other_in_a_circle():
    graph = {module: {name for _, name in found if name in MODULES} for module, found in IMPORTS.items()}
    circle = []
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = [" imports ".join(shown(MODULES[module]) for module in reversed(error.args[1]))]
    refuse(circle, "These files form a circle. Move what both need into a file below them.")


def test_a_long_file_says_why():
    long = [
        f"{shown(path)}: {number} lines"
        for path, number in LINES.items()
        if number > MOST_LINES_A_FILE and "Long because" not in (ast.get_docstring(ast.parse(path.read_text())) or "")
    ]
    refuse(long, f"Over {MOST_LINES_A_FILE} lines: split it, or let its docstring say 'Long because …'.")


def test_the_package_stays_small():
    files, lines = len(LINES), sum(LINES.values())
    too_much = [f"{files} files, at most {MOST_FILES}"] * (files > MOST_FILES)
    too_much += [f"{lines} lines, at most {MOST_LINES}"] * (lines > MOST_LINES)
    refuse(too_much, "Merge a small file into its one caller, and look for what a new feature makes needless:")


def test_a_file_name_occurs_once():
    found = collections.defaultdict(list)
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] not in NAMED_AFTER_OTHERS and path.name not in SAME_PART:
            found[path.name].append(shown(path))
    twice = [" and ".join(paths) for paths in found.values() if len(paths) > 1]
    refuse(twice, "These files share a name: give each a name of its own, or explain it in SAME_PART.")


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
    found = {
        path.relative_to(PACKAGE).as_posix(): names
        for path in FILES
        if (names := sorted(uses_of_dagsters_private_parts(ast.parse(path.read_text()))))
    }
    assert found.pop(PRIVATE_API)
    assert found == {}


def test_the_package_says_its_version():
    assert extraction_dagster.__version__ == "0.1.0"
