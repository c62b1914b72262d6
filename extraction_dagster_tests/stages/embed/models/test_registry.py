from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch  # noqa: TID253 - a model of the test's own computes with it

from extraction_dagster.errors.embed import EmbeddingModelError
from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.models import lite0 as efficientnet_lite0
from extraction_dagster.stages.embed.models import registry
from extraction_dagster.stages.embed.models.interface import EmbeddingModel, ModelFamily, TextEmbeddingModel
from extraction_dagster.stages.embed.models.preprocess import SQUASH, squash
from extraction_dagster.stages.embed.models.registry import (
    embedding_fingerprint,
    embedding_settings_fingerprint,
    load_model,
)
from extraction_dagster.stages.embed.runtime import open_device


def test_an_unknown_name_is_an_error_that_says_which_there_are():
    settings = Settings(model="efficientnet-lite9")

    for ask in (load_model, embedding_fingerprint, embedding_settings_fingerprint):
        with pytest.raises(
            EmbeddingModelError, match=r"'efficientnet-lite9'.*Available: efficientnet-lite0 \(packaged"
        ):
            ask(settings)


def test_one_model_is_resident_however_often_it_is_asked_for(cpu_settings):
    model = load_model(cpu_settings)

    assert load_model(cpu_settings) is model
    assert load_model(Settings(device="cpu", embed_batch_size=7, embed_threads=1)) is model


def test_the_model_carries_the_fingerprint_of_its_settings(model, cpu_settings):
    assert model.fingerprint == embedding_fingerprint(cpu_settings)
    assert (model.name, model.dim, model.device) == ("efficientnet-lite0", 1280, "cpu")
    assert not isinstance(model, TextEmbeddingModel)


def test_the_fingerprint_of_the_packaged_model_is_the_one_that_stored_vectors_carry():
    # A new value here makes every stored vector of the packaged model stale: change it only when vectors change.
    assert embedding_fingerprint(Settings()) == "b09dd35f82abb652"
    assert embedding_settings_fingerprint(Settings()) == "723a8f0d03303c4f"


def test_what_moves_no_vector_is_in_no_fingerprint():
    other = Settings(embed_batch_size=99, device="cpu", embed_threads=1, fps=3.0)

    assert embedding_fingerprint(other) == embedding_fingerprint(Settings())
    assert embedding_settings_fingerprint(other) == embedding_settings_fingerprint(Settings())


@pytest.mark.parametrize(("name", "value"), [("MEAN", 128), ("STD", 127), ("SIDE_PX", 240), ("SQUASH", "other")])
def test_a_change_of_preprocessing_changes_both_fingerprints(monkeypatch, name, value):
    before = embedding_fingerprint(Settings()), embedding_settings_fingerprint(Settings())
    monkeypatch.setattr(efficientnet_lite0, name, value)

    assert embedding_fingerprint(Settings()) != before[0]
    assert embedding_settings_fingerprint(Settings()) != before[1]


def test_other_weights_change_the_fingerprint_but_not_the_settings_one(monkeypatch, tmp_path):
    before = embedding_fingerprint(Settings()), embedding_settings_fingerprint(Settings())
    (tmp_path / "other.pth").write_bytes(b"other weights")
    monkeypatch.setattr(efficientnet_lite0, "weights_path", lambda: tmp_path / "other.pth")

    assert embedding_fingerprint(Settings()) != before[0]
    assert embedding_settings_fingerprint(Settings()) == before[1]


class ColourHistogram(EmbeddingModel):
    """Shares of 8 colours: which of red, green and blue are at least half."""

    network_dim = 8

    def prepare(self, images):
        return squash(images, height_px=32, width_px=32)

    def forward(self, pixels):
        halves = (pixels >> 7).long()
        colours = halves[..., 0] * 4 + halves[..., 1] * 2 + halves[..., 2]
        return torch.nn.functional.one_hot(colours.flatten(1), self.network_dim).float().mean(1)


def histogram_identity(_settings):
    return {"model": "colour-histogram", "bins": 8, "resize": SQUASH}


HISTOGRAMS = ModelFamily(
    shown="colour-histogram",
    answers_for="colour-histogram".__eq__,
    settings_identity=histogram_identity,
    identity=histogram_identity,
    dim=lambda _: ColourHistogram.network_dim,
    load=lambda settings, fingerprint: ColourHistogram(
        settings.model, None, device=open_device(settings), fingerprint=fingerprint
    ),
)


def test_a_model_of_ones_own_is_a_class_and_a_family(monkeypatch, cpu_settings):
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, HISTOGRAMS))
    monkeypatch.setattr(registry, "_resident", {})
    wanted = cpu_settings.model_copy(update={"model": "colour-histogram"})
    red, yellow = np.zeros((48, 64, 3), np.uint8), np.zeros((30, 30, 3), np.uint8)
    red[..., 0], yellow[..., :2] = 255, 255

    model = load_model(wanted)

    assert (model.name, model.dim, model.device) == ("colour-histogram", 8, "cpu")
    assert model.fingerprint == embedding_fingerprint(wanted) == embedding_settings_fingerprint(wanted)
    assert model.embed_images([red, yellow]).tolist() == [[0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 0]]
    cut = load_model(wanted.model_copy(update={"embedding_dim": 5}))
    assert cut.embed_images([red, yellow]).tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]


def test_fingerprints_need_no_torch():
    script = (
        "import sys\n"
        "from extraction_dagster.settings import Settings\n"
        "from extraction_dagster.shards import embedding_store\n"
        "from extraction_dagster.stages.embed.models import registry as model\n"
        "from extraction_dagster.stages.embed import query, stage\n"
        "model.embedding_fingerprint(Settings()), model.embedding_settings_fingerprint(Settings())\n"
        "print(sorted({'torch', 'cv2', 'pyarrow', 'transformers'} & set(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)

    assert ran.stdout.strip() == "[]"
