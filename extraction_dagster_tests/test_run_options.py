"""What one run may do differently: validated as the settings are, and refused where it would change nothing."""

import pytest

from extraction_dagster.errors import SettingsError
from extraction_dagster.errors.runs import RunOptionError
from extraction_dagster.run_options import OVERRIDABLE, describe_options, model_as_environment, settings_with
from extraction_dagster.settings import Settings, load_settings


def test_without_options_a_run_follows_the_settings(monkeypatch):
    monkeypatch.setenv("EXTRACTION_FPS", "3")
    assert settings_with({}) == load_settings()


def test_an_option_takes_the_settings_place_for_this_run_alone(monkeypatch):
    monkeypatch.setenv("EXTRACTION_FPS", "3")
    monkeypatch.setenv("EXTRACTION_BATCH_SIZE", "7")
    settings = settings_with({"fps": 0.5, "model": "./clip"})
    assert (settings.fps, settings.model, settings.batch_size) == (0.5, "./clip", 7)
    assert load_settings().fps == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fps": -1.0}, r"Run option fps is -1\.0, expected Input should be greater than 0\. Nothing was started\."),
        ({"embed_batch_size": 0}, "Run option embed_batch_size is 0, expected Input should be greater than or equal"),
        ({"device": "gpu"}, "Run option device is 'gpu', expected String should match pattern"),
        (
            {"min_frames": 700},
            r"Run option min_frames is 700, expected min_frames \(700\) must not be greater than max_frames \(600\)",
        ),
        ({"num_frames": 8}, "Run option num_frames is 8, expected it left out, or sampling=uniform: with sampling=fps"),
        ({"sampling": "uniform", "fps": 2.0}, r"Run option fps is 2\.0, expected it left out, or sampling=fps"),
        ({"sampling": "uniform", "max_frames": 9}, "Run option max_frames is 9, expected num_frames in its place"),
        ({"scene_distance": 0.5}, "Run option scene_distance is 0.5, expected it left out, or sampling=scene"),
    ],
)
def test_a_wrong_option_is_refused_with_its_fix(options, words):
    with pytest.raises(RunOptionError, match=f"{words}.*under resources: extraction: config"):
        settings_with(options)


def test_an_option_may_need_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("EXTRACTION_SAMPLING", "uniform")
    assert settings_with({"num_frames": 8}).num_frames == 8


def test_the_environments_own_mistakes_are_still_the_settings(monkeypatch):
    monkeypatch.setenv("EXTRACTION_FPS", "0")
    with pytest.raises(SettingsError, match="Setting EXTRACTION_FPS is '0'"):
        settings_with({"num_frames": 8})


def test_every_option_is_a_setting():
    assert set(OVERRIDABLE) <= set(Settings.model_fields)


def test_options_in_words_and_as_variables(settings):
    assert describe_options({"sampling": "fps", "fps": 2.0}) == "fps=2.0, sampling=fps"
    assert describe_options({}) == ""
    assert model_as_environment(settings(model="./clip")) == "EXTRACTION_MODEL=./clip"
    assert model_as_environment(settings(embedding_dim=8)) == (
        "EXTRACTION_MODEL=efficientnet-lite0 EXTRACTION_EMBEDDING_DIM=8"
    )
