"""What an export holds comes back from its file, once; a file that is no export of ours is refused by its row."""

import gzip
import json
import shutil
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extraction_dagster.errors.index import PointFileError, StoreEngineError
from extraction_dagster.records import EmbeddingBatch, VideoRow
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.export import export_points
from extraction_dagster.stages.index.importing import Caps, check_points, import_points, require_fit
from extraction_dagster.stages.index.point_files import open_point_file
from extraction_dagster.stages.index.points import PointBatch, PointFilter, point_id
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.stage import replace_records

FRAMES = {7: [0, 30], 8: [15], -3: [0, 1, 2]}
ROWS = {
    7: VideoRow(7, "/v/7.mp4", "insta", "c7", payload={"likes": 5, "tags": ["ä", None, {"a": 1.5}]}),
    8: VideoRow(8, "/v/\udcff.mp4"),
    -3: VideoRow(-3, "https://me:pw@host/a.mp4?sig=x", "tube", "x"),
}
MOMENT = datetime(2026, 1, 31, 12, tzinfo=UTC)
GENERATIONS = {7: "a", 8: "b", -3: "c"}
CAPS = Caps(label=2048, address=16_384, payload=32_768)
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")


def fill(store, embeddings):
    replace_records(store, embeddings(FRAMES), rows=ROWS, generations=GENERATIONS, created_at=MOMENT)
    return store


def held(store):
    return {
        point: (dict(payload), vector.tolist())
        for batch in store.read()
        for point, payload, vector in zip(batch.ids, batch.payloads, batch.vectors, strict=True)
    }


def bring(store, path, caps=CAPS):
    """Check a file, import it, and say what became of its points."""
    with open_point_file(path, most_bytes=caps.most_bytes) as file:
        points = check_points(file, caps)
        assert points == file.points
        done = import_points(store, file, caps)
        assert done.points == points
        return done.written, done.unchanged, done.refused


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A folder with the points of FRAMES in a file of each format; what they are, by id."""
    folder = tmp_path_factory.mktemp("origin")
    numbers = np.array([number for part in FRAMES.values() for number in part])
    ids = np.array([record_id for record_id, part in FRAMES.items() for _ in part])
    vectors = np.random.default_rng(0).standard_normal((len(ids), 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    with EdgeStore(folder / "qdrant", source="0123456789abcdef") as store:
        store.ensure_collection(CollectionSpec("frames", 8, "abc123"))
        fill(store, lambda _: EmbeddingBatch(vectors, ids, numbers, numbers / 30.0))
        for ending in ENDINGS:
            assert export_points(store, store.open_collection("frames"), folder / f"points{ending}") == 6
        return folder, held(store)


@pytest.fixture
def exported(origin, tmp_path):
    """`exported(".jsonl")`: a file with the points of FRAMES."""
    return lambda ending: Path(shutil.copy(origin[0] / f"points{ending}", tmp_path / f"points{ending}"))


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_point_comes_back_from_each_format_and_a_second_time_none_is_written(ending, opened, exported, origin):
    path = exported(ending)
    with open_point_file(path, most_bytes=CAPS.most_bytes) as file:
        assert (file.head.collection, file.head.dim, file.head.fingerprint) == ("frames", 8, "abc123")
        assert (file.head.source, file.head.distance, file.points) == ("0123456789abcdef", "Cosine", 6)
    assert bring(opened, path) == (6, 0, 0)
    assert bring(opened, path) == (0, 6, 0)
    wanted, found = origin[1], held(opened)
    assert wanted.keys() == found.keys()
    for point, (payload, vector) in wanted.items():
        assert found[point][0] == payload
        assert found[point][1] == pytest.approx(vector, abs=2e-3)


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_was_lost_is_written_and_what_was_changed_since_stays(ending, opened, embeddings, exported):
    path = exported(ending)
    fill(opened, embeddings)
    opened.delete(PointFilter(point_ids=(point_id(7, 0), point_id(-3, 2))))
    replace_records(opened, embeddings({8: [15, 99]}, seed=3), rows=ROWS, generations={8: "of-today"})
    before = held(opened)
    assert bring(opened, path) == (2, 3, 1)
    found = held(opened)
    assert found.keys() - before.keys() == {point_id(7, 0), point_id(-3, 2)}
    assert found[point_id(8, 15)] == before[point_id(8, 15)]
    assert opened.count_by_generation(PointFilter(record_ids=(8,))) == {(8, "of-today"): 2}


@pytest.mark.parametrize("ending", ENDINGS)
def test_points_of_rows_that_say_nothing_come_back(ending, spec, embeddings, tmp_path):
    with EdgeStore(tmp_path / "store") as store:
        store.ensure_collection(spec)
        replace_records(store, embeddings({7: [0, 1]}), rows={7: VideoRow(7, "v.mp4")}, generations={7: "a"})
        export_points(store, spec, tmp_path / f"points{ending}")
        assert bring(store, tmp_path / f"points{ending}") == (0, 2, 0)


def test_an_empty_export_comes_back(opened, spec, tmp_path):
    for ending in ENDINGS:
        export_points(opened, spec, tmp_path / f"points{ending}")
        assert bring(opened, tmp_path / f"points{ending}") == (0, 0, 0)


def test_a_changed_payload_of_the_same_generation_is_written_as_the_file_has_it(opened, embeddings, exported):
    path = exported(".jsonl")
    fill(opened, embeddings)
    (batch,) = opened.read(PointFilter(record_ids=(7,)))
    opened.upsert(PointBatch(batch.ids, batch.vectors, [{**each, "platform": "elsewhere"} for each in batch.payloads]))
    assert bring(opened, path) == (2, 4, 0)
    assert {payload["platform"] for payload in opened.payloads(PointFilter(record_ids=(7,)), ["platform"])} == {"insta"}


def test_an_export_of_an_earlier_release_comes_back(opened, exported, tmp_path):
    path = exported(".parquet")
    table = pq.read_table(path)
    about = json.dumps({"collection": "video_frames", "dim": "8", "fingerprint": "abc123"})
    pq.write_table(table.replace_schema_metadata({"extraction": about}), tmp_path / "old.parquet", compression="zstd")
    assert bring(opened, tmp_path / "old.parquet") == (6, 0, 0)


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_an_import_that_is_stopped_anywhere_goes_on_where_it_was(ending, spec, exported, tmp_path, monkeypatch):
    monkeypatch.setattr("extraction_dagster.stages.index.importing.MAX_POINTS_PER_CALL", 1)
    path, stops = exported(ending), 0
    with EdgeStore(tmp_path / "to") as store:
        store.ensure_collection(spec)
        write, left = store._write, [0]

        def write_some(batch):
            left[0] -= 1
            if left[0] < 0:
                raise StoreEngineError("write points", "here", "it was stopped")
            write(batch)

        monkeypatch.setattr(store, "_write", write_some)
        for writes in (0, 1, 4):
            left[0] = writes
            with pytest.raises(StoreEngineError, match="it was stopped"):
                bring(store, path)
            stops += writes
            assert store.count() == stops
        left[0] = 9
        assert bring(store, path) == (1, 5, 0)
        assert bring(store, path) == (0, 6, 0)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def put_lines(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def point(change, number=2):
    """Change a point of a file of lines."""

    def change_lines(lines):
        lines[number - 1] = change(lines[number - 1]) or lines[number - 1]

    return change_lines


def payload(**values):
    return point(lambda line: line["payload"].update(values))


def vector(*numbers):
    return point(lambda line: line.update(vector=list(numbers)))


def drop_a_line(lines):
    del lines[3]


def swap(lines):
    lines[2], lines[3] = lines[3], lines[2]


def say_again(lines):
    lines[3] = lines[2]


def head(**values):
    return lambda lines: lines[0]["extraction"].update(values)


DEEP = "[" * 40 + "]" * 40
# What is wrong with a file of lines, the line that is named, and what is said.
HOSTILE = {
    "a vector that is shorter": (vector(1.0), "line 2", "its vector has 1 numbers, expected 8"),
    "a vector of nothing": (vector(*[0] * 8), "line 2", "its vector has norm 0, expected 1"),
    "a vector that is longer than one": (vector(*[1] * 8), "line 2", "its vector has norm 2.828, expected 1"),
    "a vector without end": (vector(1e308, *[0] * 7), "line 2", "norm inf"),
    "a vector of an endless number": (vector(10**400, *[0] * 7), "line 2", "too large"),
    "a vector of texts": (vector("1", *[0] * 7), "line 2", "holds what is no number"),
    "a vector of truths": (vector(True, *[0] * 7), "line 2", "holds what is no number"),  # noqa: FBT003 - a value
    "a vector that is none": (point(lambda line: line.update(vector="x")), "line 2", "its vector has none"),
    "NaN": (point(lambda line: json.dumps(line).replace("[", "[NaN, ", 1)), "line 2", "its JSON holds NaN"),
    "no object": (point(lambda _: "[]"), "line 2", "no object of id, payload and vector"),
    "half a line": (point(lambda line: json.dumps(line)[:40], number=7), "line 7", "line 1 column"),
    "an empty line": (point(lambda _: " "), "line 2", "Expecting value"),
    "nested without end": (point(lambda _: "[" * 100_000), "line 2", "nested too deeply"),
    "another id": (point(lambda line: line.update(id=point_id(7, 31))), "line 2", f"its id is '{point_id(7, 31)}'"),
    "an id that is none": (point(lambda line: line.update(id=7)), "line 2", "its id is 7, expected "),
    "an id of another form": (point(lambda line: line.update(id=line["id"].upper())), "line 2", "its id is '"),
    "a record beyond 64 bits": (payload(record_id=2**63), "line 2", "record_id is 9223372036854775808"),
    "a record in words": (payload(record_id="7"), "line 2", "record_id is '7'"),
    "a frame before the first": (payload(frame_number=-1), "line 2", "frame_number is -1"),
    "a second in words": (payload(frame_second="1"), "line 2", "frame_second is '1'"),
    "no payload": (point(lambda line: line.update(payload=None)), "line 2", "its payload lacks one of record_id"),
    "no generation": (point(lambda line: line["payload"].pop("generation") and None), "line 2", "lacks one of"),
    "a generation that is none": (payload(generation="a b"), "line 2", "generation is 'a b'"),
    "a moment that is none": (payload(created_at="soon"), "line 2", "created_at is 'soon', expected a moment such as"),
    "a platform without end": (
        payload(platform="x" * 3000),
        "line 2",
        "platform has 3000 bytes, expected at most 2048",
    ),
    "a path that is none": (payload(path=None), "line 2", "path is None, expected a text"),
    "a payload without end": (payload(more="x" * 40_000), "line 2", "bytes, expected at most 32768"),
    "a payload beyond 64 bits": (payload(more=[2**64]), "line 2", "holds 18446744073709551616, expected integers of"),
    "a payload of half a letter": (payload(more={"\ud800": 1}), "line 2", "a text that is no UTF-8"),
    "a payload too deep": (payload(more=json.loads(DEEP)), "line 2", "its payload is nested too deeply"),
    "a payload of infinity": (
        point(lambda line: json.dumps(line).replace('"payload": {', '"payload": {"more": 1e999, ')),
        "line 2",
        "a number that is too large",
    ),
    "a line without end": (payload(more="x" * 10**6), "line 2 or after", "a line has more than"),
    "a point twice": (say_again, "line 4", "it stands twice"),
    "another order": (swap, "line 4", "out of the ids' order"),
    "a point less": (drop_a_line, "line 7 or after", "it has 5 points, and its first line says 6"),
    "no head": (lambda lines: lines.pop(0) and None, "", "its first line says nothing of an export of points"),
    "another distance": (head(distance="Dot"), "", "compared by Dot, expected 1 to 65536 by Cosine"),
    "no dimensions": (head(dim=0), "", "have 0 dimensions"),
    "dimensions without end": (head(dim=10**9), "", "have 1000000000 dimensions"),
    "a fingerprint that is none": (head(fingerprint=7), "", "what it says of itself can't be understood"),
    "a head of more": (head(more=1), "", "it is no export of points"),
    "no number of points": (head(points=None), "", "does not say how many points"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_of_lines_that_is_no_export_is_refused_by_its_line_before_anything_is_written(case, exported):
    change, where, why = HOSTILE[case]
    path = exported(".jsonl")
    lines = lines_of(path)
    change(lines)
    put_lines(path, lines)
    with pytest.raises(PointFileError) as raised, open_point_file(path, most_bytes=CAPS.most_bytes) as file:
        check_points(file, CAPS)
    said = str(raised.value)
    assert said.startswith(f"Points can't be imported from '{path}'{where and f', {where}'}: ")
    assert why in said
    assert "Nothing was written." in said
    assert "\n" not in said
    assert len(said) < 1000


def change_column(name, change):
    def changed(table):
        at = table.schema.get_field_index(name)
        values = change(table[name].to_pylist())
        return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))

    return changed


def first(value):
    return lambda values: [value, *values[1:]]


HOSTILE_PARQUET = {
    "a vector of nothing": (change_column("vector", first([0.0] * 8)), "row 1", "norm 0"),
    "a vector of NaN": (change_column("vector", first([float("nan")] * 8)), "row 1", "norm nan"),
    "another id": (change_column("id", first(point_id(7, 99))), "row 1", "its id is "),
    "no id": (change_column("id", first(None)), "row 1", "its id is None"),
    "no path": (change_column("path", first(None)), "row 1", "path is None"),
    "no record": (change_column("record_id", first(None)), "row 1", "record_id is None"),
    "a platform without end": (change_column("platform", first("x" * 3000)), "row 1", "platform has 3000 bytes"),
    "a path without any end": (change_column("path", first("x" * 10**6)), "rows 1 to 6", "a path has 1000000 bytes"),
    "a payload that is none": (change_column("payload", first("{")), "row 1", "its payload is no JSON"),
    "a payload of another kind": (change_column("payload", first("[]")), "row 1", "its payload is no object"),
    "a payload that lies": (change_column("payload", first('{"path": "x"}')), "row 1", "holds a key of every point"),
    "a point twice": (lambda table: pa.concat_tables([table, table.slice(5)]), "row 7", "it stands twice"),
    "a column less": (lambda table: table.drop_columns(["path"]), "", "its columns are id "),
    "a column of another type": (
        lambda table: table.set_column(1, "record_id", table["record_id"].cast(pa.int32())),
        "",
        "its columns are id ",
    ),
    "no head": (lambda table: table.replace_schema_metadata({}), "", "it is no export of points"),
}


@pytest.mark.parametrize("case", HOSTILE_PARQUET)
def test_a_parquet_file_that_is_no_export_is_refused_by_its_row(case, exported):
    change, where, why = HOSTILE_PARQUET[case]
    path = exported(".parquet")
    pq.write_table(change(pq.read_table(path)), path, compression="zstd")
    with (
        pytest.raises(PointFileError) as raised,
        open_point_file(path, most_bytes=CAPS.most_bytes) as file,
    ):
        check_points(file, CAPS)
    said = str(raised.value)
    assert said.startswith(f"Points can't be imported from '{path}'{where and f', {where}'}: ")
    assert why in said
    assert "\n" not in said


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_is_cut_or_none_or_no_file_is_refused(ending, exported, tmp_path):
    path = exported(ending)
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[: len(whole) // 2], whole[:-3], b"\xff" * 100, whole[100:]):
        path.write_bytes(content)
        with (
            pytest.raises(PointFileError, match="can't be imported from"),
            open_point_file(path, most_bytes=CAPS.most_bytes) as file,
        ):
            check_points(file, CAPS)
    for name in ("none", "folder"):
        (tmp_path / f"folder{ending}").mkdir(exist_ok=True)
        with pytest.raises(PointFileError, match=r"No such file|it is no|says nothing|nothing of an export"):
            open_point_file(tmp_path / f"{name}{ending}", most_bytes=CAPS.most_bytes)


def test_a_file_that_changes_after_it_was_checked_is_stopped_at_and_says_what_was_written(spec, exported, tmp_path):
    path = exported(".jsonl")
    lines = lines_of(path)
    with (
        EdgeStore(tmp_path / "to") as store,
        open_point_file(path, most_bytes=CAPS.most_bytes) as file,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("extraction_dagster.stages.index.point_files.POINTS_PER_GROUP", 2)
        store.ensure_collection(spec)
        check_points(file, CAPS)
        lines[5]["payload"]["path"] = 7
        put_lines(path, lines)
        with pytest.raises(PointFileError, match=r"line 6: path is 7.* 4 points before it were written and stay"):
            import_points(store, file, CAPS)
        assert store.count() == 4


def test_vectors_of_another_embedding_are_refused():
    own = CollectionSpec("video_frames", 8, "abc123")
    for dim, fingerprint in ((9, "abc123"), (8, "abc124")):
        theirs = CollectionSpec("other", dim, fingerprint)
        with pytest.raises(
            PointFileError, match=rf"of dim {dim}, fingerprint {fingerprint}, and those of .* EXTRACTION_MODEL"
        ):
            require_fit("a.parquet", theirs, own)
    require_fit("a.parquet", own, own)


MEMORY = """
import resource, sys
from pathlib import Path
from extraction_dagster.errors.index import PointFileError
from extraction_dagster.stages.index.importing import Caps, check_points
from extraction_dagster.stages.index.point_files import open_point_file
import pyarrow.compute, pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
caps = Caps(2048, 16_384, 32_768)
try:
    with open_point_file(Path(sys.argv[1]), most_bytes=caps.most_bytes) as file:
        print(check_points(file, caps))
except PointFileError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def memory_mib(path):
    """What is said of a file, and the memory that it took, in MiB."""
    run = [sys.executable, "-c", textwrap.dedent(MEMORY), str(path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=True)
    *said, mib = done.stdout.strip().splitlines()
    return " ".join(said), int(mib)


def test_a_small_file_that_unpacks_to_much_takes_no_memory(exported, tmp_path):
    endless = tmp_path / "endless.jsonl.gz"
    with gzip.open(endless, "wb", compresslevel=1) as file:
        file.write(json.dumps(lines_of(exported(".jsonl"))[0]).encode() + b"\n")
        for _ in range(300):
            file.write(b" " * 2**20)
    said, mib = memory_mib(endless)
    assert "a line has more than" in said
    assert mib < 60
    table = pq.read_table(exported(".parquet")).slice(0, 1)
    much = pa.concat_tables([table] * 200).combine_chunks()
    much = change_column("path", lambda values: ["x" * 2**20] * len(values))(much)
    pq.write_table(much, tmp_path / "much.parquet", compression="zstd", row_group_size=2048)
    said, mib = memory_mib(tmp_path / "much.parquet")
    assert "a path has 1048576 bytes, expected at most" in said
    assert mib < 100


def test_many_points_take_no_more_memory_than_few(exported, tmp_path):
    head, line, *_ = lines_of(exported(".jsonl"))
    sizes = {}
    for number in (2_000, 20_000):
        path = tmp_path / f"{number}.jsonl"
        points = sorted((point_id(frame, 1), frame) for frame in range(number))
        lines = (
            {**line, "id": key, "payload": line["payload"] | {"record_id": frame, "frame_number": 1}}
            for key, frame in points
        )
        put_lines(path, [{"extraction": head["extraction"] | {"points": number}}, *lines])
        said, sizes[number] = memory_mib(path)
        assert said == str(number)
    assert sizes[20_000] < sizes[2_000] + 20
