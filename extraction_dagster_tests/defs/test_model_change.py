"""Another EXTRACTION_MODEL: which assets it concerns, and a range that is embedded anew without decoding anything."""

import json
import os
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest

EXTRACTION = Path(sys.executable).parent / "extraction"
VERSIONS = (
    "import json\n"
    "from extraction_dagster.definitions import defs\n"
    "specs = defs.resolve_all_asset_specs()\n"
    "print(json.dumps({spec.key.to_user_string(): spec.code_version for spec in specs}))\n"
)
ASSETS = {"video_frames", "frame_embeddings", "qdrant_points"}


@pytest.fixture
def run(commands):
    def run(*command, cwd, code=0, **environment):
        environment = {**os.environ, "NO_COLOR": "1", **environment}
        modules = ["transformers"] if "EXTRACTION_MODEL" in environment else []
        done = commands.run(command, cwd=cwd, env=environment, modules=modules)
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def code_versions(run, tmp_path):
    def code_versions(**environment):
        found = json.loads(run(sys.executable, "-c", VERSIONS, cwd=tmp_path, **environment).stdout.splitlines()[-1])
        return {name: version for name, version in found.items() if name in ASSETS}

    return code_versions


def changed(before, after):
    assert before.keys() == after.keys() == ASSETS
    return {name for name in before if before[name] != after[name]}


def test_a_model_concerns_vectors_and_points_and_no_frames(code_versions, saved_models):
    plain = code_versions()
    clip = code_versions(EXTRACTION_MODEL=str(saved_models("clip")))
    shorter = code_versions(EXTRACTION_MODEL=str(saved_models("clip")), EXTRACTION_EMBEDDING_DIM="8")

    assert changed(plain, clip) == {"frame_embeddings", "qdrant_points"}
    assert changed(clip, shorter) == {"frame_embeddings", "qdrant_points"}
    assert changed(plain, code_versions(EXTRACTION_FPS="2")) >= {"video_frames"}


@pytest.fixture
def two_videos(tmp_path, small_clips):
    """A data folder with a table of two videos."""
    (tmp_path / ".extraction").mkdir()
    (tmp_path / ".extraction" / "videos").symlink_to(small_clips)
    connection = sqlite3.connect(tmp_path / ".extraction" / "source.db")
    connection.execute(
        "CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform, code, path TEXT, "
        "is_extracted BOOLEAN NOT NULL DEFAULT 0, is_embedded BOOLEAN NOT NULL DEFAULT 0)"
    )
    rows = [(1, "tube", "a", "a.mp4"), (2, "tube", "b", "b.mp4")]
    connection.executemany("INSERT INTO insta_content (id, platform, code, path) VALUES (?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    return tmp_path


def shards(folder, kind):
    """Every shard, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in (folder / ".extraction" / kind).rglob("*.parquet")}


def ledger(folder):
    connection = sqlite3.connect(f"file:{folder}/.extraction/source.db?mode=ro", uri=True)
    columns = "record_id, state, num_frames, num_points, embedding_fingerprint"
    rows = connection.execute(f"SELECT {columns} FROM extraction_ledger ORDER BY record_id").fetchall()
    connection.close()
    return rows


@pytest.mark.slow
def test_a_range_is_embedded_anew_with_another_model_and_nothing_is_decoded(run, two_videos, saved_models):
    run(EXTRACTION, "launch", "1-2", cwd=two_videos)
    frames, vectors, before = shards(two_videos, "frames"), shards(two_videos, "embeddings"), ledger(two_videos)
    # The videos are out of reach now: whoever decoded again would fail.
    (two_videos / ".extraction" / "videos").unlink()
    (two_videos / ".extraction" / "videos").mkdir()
    clip = {"EXTRACTION_MODEL": str(saved_models("clip"))}

    run(EXTRACTION, "collection", "stage", cwd=two_videos, **clip)
    launched = run(EXTRACTION, "launch", "1-2", cwd=two_videos, **clip)
    run(EXTRACTION, "collection", "publish", cwd=two_videos, **clip)

    assert "Nothing to decode (IDs: 1 - 2)" in launched.stderr
    assert shards(two_videos, "frames") == frames
    assert len(frames) > 0
    anew = {path for path in shards(two_videos, "embeddings") if path not in vectors}
    assert len(anew) == len(frames)
    after = ledger(two_videos)
    assert [row[:4] for row in after] == [row[:4] for row in before]
    assert [row[1] for row in after] == ["done", "done"]
    assert not {row[4] for row in after} & {row[4] for row in before}

    text = run(EXTRACTION, "search", "--text", "two cats", "--json", cwd=two_videos, **clip)
    assert {hit["record_id"] for hit in json.loads(text.stdout)["hits"]} == {1, 2}


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "a pickle, which can run code when it is read"


def own_code(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    (folder / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    return "Python code of the model's own"


def no_preprocessor(folder):
    (folder / "preprocessor_config.json").unlink()
    return "no such file"


def wrong_dim(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"projection_dim": 8}))
    return "got vectors of 8 numbers, expected 24"


@pytest.mark.slow
def test_a_hostile_model_is_refused_before_anything_is_written(run, two_videos, saved_models):
    for number, breakage in enumerate([pickle_only, own_code, no_preprocessor, wrong_dim]):
        model = two_videos / f"model{number}"
        shutil.copytree(saved_models("clip"), model)
        words = breakage(model)

        refused = run(EXTRACTION, "launch", "1-2", cwd=two_videos, code=1, EXTRACTION_MODEL=str(model))

        assert words in refused.stdout + refused.stderr
        assert "Nothing was written." in refused.stdout + refused.stderr
        assert shards(two_videos, "") == {}
        assert ledger(two_videos) == []
        assert not (two_videos / "ran").exists()
        assert not (two_videos / ".extraction" / "points").exists()
