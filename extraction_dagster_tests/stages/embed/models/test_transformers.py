"""Tiny random models, saved here and loaded offline, against transformers' own way with the same folders.

Models of the hub: pinned or refused, out of the cache without a network, one line when they can't be fetched.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import huggingface_hub.constants
import numpy as np
import pytest
import torch  # noqa: TID253 - the reference is computed with it
import transformers  # noqa: TID253 - as above
from PIL import Image
from safetensors.torch import load_file, save_file

from extraction_dagster.errors import SettingsError
from extraction_dagster.errors.embed import EmbeddingModelError, ModelFilesError
from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.models.interface import TextEmbeddingModel
from extraction_dagster.stages.embed.models.registry import (
    embedding_fingerprint,
    embedding_settings_fingerprint,
    load_model,
)
from extraction_dagster.stages.embed.passes import normalise

TEXTS = ["two cats", "a red bus in the rain", "a man plays the guitar on a stage, and everybody sings along with him"]
SIZES = [(96, 64), (64, 96), (32, 32), (17, 23), (224, 398), (301, 41)]


@pytest.fixture
def load(saved_models):
    def loaded(kind="clip", **overrides):
        return load_model(Settings(model=str(saved_models(kind)), device="cpu", embed_threads=1, **overrides))

    return loaded


@pytest.fixture(scope="session")
def pictures():
    """Of several shapes, also smaller than what the models take."""
    rng = np.random.default_rng(5)
    coarse = [rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8) for height, width in SIZES]
    return [
        np.ascontiguousarray(image.repeat(8, 0).repeat(8, 1)[:height, :width])
        for image, (height, width) in zip(coarse, SIZES, strict=True)
    ]


def reference_images(folder, images):
    """As transformers' documentation does it."""
    network = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    inputs = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
    with torch.inference_mode():
        if hasattr(network, "get_image_features"):
            return network.get_image_features(**inputs).pooler_output.numpy()
        return network(**inputs).pooler_output.numpy()


def cosines(left, right):
    return (normalise(left)[0] * normalise(right)[0]).sum(1)


@pytest.mark.parametrize(("kind", "dim"), [("clip", 24), ("siglip", 32), ("siglip2", 32), ("dinov2", 32)])
def test_image_vectors_are_those_of_transformers(load, saved_models, pictures, kind, dim):
    model = load(kind)
    vectors = model.embed_images(pictures)

    assert (vectors.shape, vectors.dtype, model.dim, model.device) == ((6, dim), np.float32, dim, "cpu")
    assert cosines(vectors, reference_images(saved_models(kind), pictures)).min() > 0.9999
    # Random weights still tell the pictures apart, or the line above would say little.
    assert cosines(vectors, np.roll(vectors, 1, 0)).max() < 0.999


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "dinov2"])
def test_prepared_pixels_are_within_one_step_of_the_processor(load, saved_models, pictures, kind, where):
    processor = transformers.AutoImageProcessor.from_pretrained(saved_models(kind))
    expected = processor(images=pictures, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]

    got = load(kind, resize_on=where).prepare(pictures)

    assert got.dtype == np.uint8
    assert np.abs(got.transpose(0, 3, 1, 2).astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_text_vectors_are_those_of_transformers_pipeline(load, saved_models, pictures, kind):
    folder = saved_models(kind)
    model = load(kind)
    assert isinstance(model, TextEmbeddingModel)
    short = ["two cats", "a red bus"] if kind == "clip" else TEXTS  # the pipeline cuts no text for CLIP

    pipeline = transformers.pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    answers = pipeline(Image.fromarray(pictures[0]), candidate_labels=short, hypothesis_template="{}")
    expected = {answer["label"]: answer["score"] for answer in answers}

    network = transformers.AutoModel.from_pretrained(folder)
    likeness = (
        torch.from_numpy(normalise(model.embed_text(short))[0] @ normalise(model.embed_images(pictures[:1]))[0][0])
        * network.logit_scale.exp().item()
    )
    scores = likeness.softmax(0) if kind == "clip" else torch.sigmoid(likeness + network.logit_bias.item())
    # One step of 255 in some pixels is all that may differ.
    assert scores.tolist() == pytest.approx([expected[text] for text in short], abs=3e-4)
    assert max(scores) - min(scores) > 0.01


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_a_text_of_siglip_has_the_same_vector_alone_and_beside_longer_ones(load, kind):
    model = load(kind)

    assert cosines(model.embed_text(TEXTS[:1]), model.embed_text(TEXTS)[:1]).min() > 0.99999


def test_capitals_are_small_letters_to_siglip_2_which_learnt_from_no_others(load, saved_models):
    model = load("siglip2")

    assert np.array_equal(model.embed_text(["Two CATS"]), model.embed_text(["two cats"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved_models("siglip2"))
    assert tokenizer("Two CATS")["input_ids"] != tokenizer("two cats")["input_ids"]


def test_a_text_longer_than_the_model_reads_is_cut_off(load):
    model = load("clip")

    assert np.array_equal(model.embed_text([TEXTS[2]]), model.embed_text([TEXTS[2] + " and on and on"]))


def test_a_model_without_texts_has_no_embed_text(load):
    assert not isinstance(load("dinov2"), TextEmbeddingModel)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("clip", [2.138, -0.1026, 0.8042, 0.3708, -0.0791]),
        ("siglip", [0.2995, -0.1181, -0.5776, 1.0392, 0.5013]),
        ("siglip2", [1.304, 1.359, 0.1137, 0.2357, 0.8176]),
        ("dinov2", [1.9656, -0.0287, 0.293, 1.4389, 0.6264]),
    ],
)
def test_the_first_five_numbers_stay_what_they_are(load, pictures, kind, expected):
    assert load(kind).embed_images(pictures[:1])[0, :5].tolist() == pytest.approx(expected, abs=2e-4)


def test_vectors_are_the_same_in_any_batch(load, pictures):
    model = load("clip")
    pixels = model.prepare(pictures)
    alone = np.concatenate([model.embed_prepared(pixels[n : n + 1]) for n in range(len(pixels))])

    assert np.abs(model.embed_prepared(pixels) - alone).max() < 1e-5


def test_a_filter_that_torch_lacks_is_left_to_the_processor(copied_model, pictures):
    folder = copied_model("siglip")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"resample": 1}))  # Lanczos
    model = load_model(Settings(model=str(folder), device="cpu", embed_threads=1))

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    expected = processor(images=pictures, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    assert np.array_equal(model.prepare(pictures).transpose(0, 3, 1, 2), expected)
    assert cosines(model.embed_images(pictures), reference_images(folder, pictures)).min() > 0.99999


def test_the_fingerprint_is_of_the_contents_wherever_the_folder_lies(saved_models, copied_model):
    here, there = Settings(model=str(saved_models("clip"))), Settings(model=str(copied_model("clip")))

    assert embedding_fingerprint(here) == embedding_fingerprint(there)
    assert embedding_fingerprint(here) != embedding_fingerprint(Settings(model=str(saved_models("siglip"))))
    assert embedding_settings_fingerprint(here) != embedding_settings_fingerprint(there)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_changed_file_changes_the_fingerprint(copied_model, name):
    folder = copied_model("clip")
    settings = Settings(model=str(folder))
    before = embedding_fingerprint(settings)
    content = (folder / name).read_bytes()
    # Another last number, or a blank more.
    (folder / name).write_bytes(content[:-1] + b"\1" if name == "model.safetensors" else content + b" ")

    assert embedding_fingerprint(settings) != before


def test_the_type_that_it_computes_in_is_in_both_fingerprints(saved_models, load, pictures):
    plain = Settings(model=str(saved_models("dinov2")))
    half = Settings(model=str(saved_models("dinov2")), embed_dtype="bfloat16")

    assert embedding_fingerprint(plain) != embedding_fingerprint(half)
    assert embedding_settings_fingerprint(plain) != embedding_settings_fingerprint(half)
    exact, short = load("dinov2").embed_images(pictures), load("dinov2", embed_dtype="bfloat16").embed_images(pictures)
    assert not np.array_equal(exact, short)
    assert cosines(exact, short).min() > 0.999


def test_where_frames_are_resized_is_in_both_fingerprints(saved_models, load, pictures):
    for named in ({}, {"model": str(saved_models("dinov2"))}):
        there, here = Settings(resize_on="device", **named), Settings(**named)
        assert embedding_fingerprint(there) != embedding_fingerprint(here)
        assert embedding_settings_fingerprint(there) != embedding_settings_fingerprint(here)
    assert (
        cosines(load("dinov2").embed_images(pictures), load("dinov2", resize_on="device").embed_images(pictures)).min()
        > 0.9999
    )


def test_fingerprints_of_a_folder_need_neither_torch_nor_transformers(saved_models):
    script = (
        "import sys\n"
        "from extraction_dagster.settings import Settings\n"
        "from extraction_dagster.stages.embed.models import registry as model\n"
        "settings = Settings(model=sys.argv[1], embedding_dim=8)\n"
        "model.embedding_fingerprint(settings), model.embedding_settings_fingerprint(settings)\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'PIL'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", script, str(saved_models("clip"))]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert ran.stdout.strip() == "[]"


def test_a_folder_loads_without_a_network_and_without_torchvision(saved_models):
    script = (
        "import socket, sys\n"
        "def refuse(*args): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "socket.getaddrinfo = refuse\n"
        "from extraction_dagster.settings import Settings\n"
        "from extraction_dagster.stages.embed.models.registry import load_model\n"
        "model = load_model(Settings(model=sys.argv[1], device='cpu'))\n"
        "print(model.embed_text(['a cat']).shape, 'torchvision' in sys.modules)\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(saved_models("siglip"))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "(1, 32) False", "")


# Matryoshka: the leading numbers alone


def test_only_the_leading_numbers_are_kept_of_images_and_texts(load, pictures):
    whole, cut = load("clip"), load("clip", embedding_dim=8)

    assert (cut.dim, whole.dim) == (8, 24)
    assert np.array_equal(cut.embed_images(pictures), whole.embed_images(pictures)[:, :8])
    assert isinstance(cut, TextEmbeddingModel)
    assert np.array_equal(cut.embed_text(TEXTS), whole.embed_text(TEXTS)[:, :8])
    assert cut.fingerprint != whole.fingerprint
    assert not isinstance(load("dinov2", embedding_dim=8), TextEmbeddingModel)


@pytest.mark.parametrize(("kind", "dim"), [("clip", 24), ("siglip", 32), ("siglip2", 32), ("dinov2", 32)])
def test_more_numbers_than_the_model_gives_are_refused_before_it_is_loaded(saved_models, kind, dim):
    for ask in (embedding_fingerprint, load_model):
        with pytest.raises(SettingsError, match=rf"EXTRACTION_EMBEDDING_DIM is {dim + 1}, expected at most {dim}, the"):
            ask(Settings(model=str(saved_models(kind)), embedding_dim=dim + 1))


def test_the_packaged_model_can_be_cut_too(model, cpu_settings, pictures):
    cut = load_model(cpu_settings.model_copy(update={"embedding_dim": 64}))

    assert np.array_equal(cut.embed_images(pictures), model.embed_images(pictures)[:, :64])
    with pytest.raises(SettingsError, match="EXTRACTION_EMBEDDING_DIM is 1281, expected at most 1280"):
        embedding_fingerprint(Settings(embedding_dim=1281))


def test_weights_that_lack_a_tensor_are_refused_instead_of_made_up(copied_model):
    folder = copied_model("dinov2")
    tensors = load_file(folder / "model.safetensors")
    # As many numbers as before, so that only the names tell.
    tensors["another.weight"] = tensors.pop("encoder.layer.1.mlp.fc1.weight").clone()
    save_file(tensors, folder / "model.safetensors")

    with pytest.raises(
        ModelFilesError, match=r"weights without 1 tensors, the first encoder\.layer\.1\.mlp\.fc1\.weight.*Nothing was"
    ):
        load_model(Settings(model=str(folder), device="cpu"))


COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = f"acme/tiny-clip@{COMMIT}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a hub that nobody answers for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # the client waits 23 s between its tries
    return tmp_path / "hub"


def fill(cache, folder, *, leave_out=()):
    """Put a model into the cache, laid out as the hub's client does it."""
    model = cache / "models--acme--tiny-clip"
    snapshot, blobs = model / "snapshots" / COMMIT, model / "blobs"
    for made in (snapshot, blobs):
        made.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        if path.name not in leave_out:
            (blobs / str(number)).write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("google/siglip2-base-patch16-224", r"it names no commit, and what a branch or tag means can change"),
        ("google/siglip2-base-patch16-224@main", r"'main' is not a commit's 40 hexadecimal digits"),
        ("google/siglip2-base-patch16-224@0123abc", r"'0123abc' is not a commit's 40 hexadecimal digits"),
        (f"google/siglip2-base-patch16-224@{COMMIT.upper()}", r"is not a commit's 40 hexadecimal digits"),
    ],
)
def test_a_model_that_is_not_pinned_is_refused_with_how_to_pin_it(name, words):
    for ask in (embedding_settings_fingerprint, embedding_fingerprint, load_model):
        with pytest.raises(EmbeddingModelError, match=words) as refused:
            ask(Settings(model=name))
        assert "Write google/siglip2-base-patch16-224@COMMIT with the 40 digits" in str(refused.value)
        assert "a folder is written ./google/siglip2-base-patch16-224" in str(refused.value)


def test_a_cached_model_loads_without_a_network(cache, saved_models):
    fill(cache, saved_models("clip"))
    image = np.full((40, 50, 3), 90, np.uint8)

    model = load_model(Settings(model=NAME, device="cpu"))

    assert (model.name, model.dim) == (NAME, 24)
    same = load_model(Settings(model=str(saved_models("clip")), device="cpu"))
    assert np.array_equal(model.embed_images([image]), same.embed_images([image]))


def test_a_model_that_cannot_be_fetched_is_an_error_that_says_how_to_go_on(cache):
    with pytest.raises(
        ModelFilesError, match=r"loaded from the hub: got nothing \(\w+\).*EXTRACTION_MODEL to the folder"
    ):
        load_model(Settings(model=NAME, device="cpu"))
    assert not (cache / "models--acme--tiny-clip" / "snapshots").exists()


def test_a_model_cached_in_part_names_what_is_missing(cache, saved_models):
    fill(cache, saved_models("clip"), leave_out=("model.safetensors",))

    with pytest.raises(ModelFilesError, match=r"model\.safetensors: got no such file"):
        load_model(Settings(model=NAME, device="cpu"))


def test_the_fingerprint_is_the_commit_and_asks_nobody(cache):
    fingerprint = embedding_fingerprint(Settings(model=NAME))

    assert fingerprint == embedding_fingerprint(Settings(model=NAME, embed_batch_size=3))
    assert fingerprint != embedding_fingerprint(Settings(model=NAME.replace("0123", "3210", 1)))
    assert fingerprint != embedding_fingerprint(Settings(model=NAME, embedding_dim=8))
    assert not cache.exists()


def test_too_many_numbers_are_refused_once_the_model_is_known(cache, saved_models):
    fill(cache, saved_models("clip"))

    with pytest.raises(SettingsError, match="EXTRACTION_EMBEDDING_DIM is 25, expected at most 24"):
        load_model(Settings(model=NAME, device="cpu", embedding_dim=25))
