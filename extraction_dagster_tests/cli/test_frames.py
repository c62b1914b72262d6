"""`extraction frames`: what a person sees."""

import numpy as np
import pytest
from typer.testing import CliRunner

from extraction_dagster.cli.main import app
from extraction_dagster.records import EncodedFrames, IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.decode.frame_store import FrameStore, frames_fingerprint


@pytest.fixture
def stored():
    settings = load_settings()
    store = FrameStore(settings.resolved_frames_uri, frames_fingerprint(settings))
    zero = np.zeros(1)
    frames = EncodedFrames(3, "", [b"jpeg"], zero, zero, np.zeros(1, np.int64), 8, 8)
    return store.write_shard(IdRange(1, 10), [frames])


@pytest.mark.usefixtures("stored")
def test_export_says_what_it_wrote(tmp_path):
    done = CliRunner().invoke(app, ["frames", "export", "1-5", "--to", "out"])
    assert (done.exit_code, done.output) == (0, "Wrote 1 frames of 1 videos to out\n")
    assert (tmp_path / "out" / "3" / "00000000.jpg").read_bytes() == b"jpeg"


def test_a_packed_tar_is_wrong_usage(tmp_path):
    done = CliRunner().invoke(app, ["frames", "export", "1-5", "--to", "out.tar.gz"])
    assert done.exit_code == 2
    assert "a name that ends in .tar, not .gz" in done.output
    assert list(tmp_path.iterdir()) == []


def test_prune_leaves_everything_unless_the_settings_say_otherwise(stored):
    done = CliRunner().invoke(app, ["frames", "prune"])
    assert (done.exit_code, done.output.partition(":")[0]) == (0, "EXTRACTION_KEEP_FRAMES is 'all'")
    assert stored.path
