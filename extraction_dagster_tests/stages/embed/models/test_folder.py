"""Folders that are broken, lie or attack: each is refused in one line, before torch is asked for anything."""

from __future__ import annotations

import json
import pickle
import struct

import numpy as np
import pytest
import torch  # noqa: TID253 - weights are made with it
from safetensors.torch import load_file, save_file
from transformers import AutoModel, dynamic_module_utils  # noqa: TID253 - saves; its cache is put into the test's folder

from extraction_dagster.errors.embed import ModelFilesError
from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.models.folder import inspect_folder
from extraction_dagster.stages.embed.models.registry import embedding_fingerprint, load_model


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickle_only(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"run": "me"}))


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def cut_off(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])


def huge_header(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + whole[8:])


def lying_shapes(folder):
    header = json.dumps({"a": {"dtype": "F32", "shape": [-1, 10], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)


def no_config(folder):
    (folder / "config.json").unlink()


def no_preprocessor(folder):
    (folder / "preprocessor_config.json").unlink()


def garbage_config(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe not json")


def list_config(folder):
    (folder / "config.json").write_text("[1, 2]")


def deep_config(folder):
    (folder / "config.json").write_text("[" * 200_000)


def huge_config(folder):
    edit(folder / "config.json", padding="x" * 5_000_000)


def own_code(folder):
    edit(folder / "config.json", auto_map={"AutoModel": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")


def own_processor_code(folder):
    edit(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "elsewhere/repo--evil.Evil"})


def own_tokenizer_code(folder):
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Slow", None]})


def other_architecture(folder):
    edit(folder / "config.json", model_type="llama")


def naflex(folder):
    edit(folder / "config.json", model_type="siglip2")


def endless_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 10**9
    (folder / "config.json").write_text(json.dumps(config))


def huge_number(folder):
    edit(folder / "config.json", projection_dim=10**400)


def wrong_dim(folder):
    edit(folder / "config.json", projection_dim=8)


def far_too_large_dim(folder):
    edit(folder / "config.json", projection_dim=2048)


def text_for_a_part(folder):
    edit(folder / "config.json", vision_config="none")


def link_outside(folder):
    secret = folder.parent / "secret.json"
    (folder / "preprocessor_config.json").rename(secret)
    (folder / "preprocessor_config.json").symlink_to(secret)


def dangling_link(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "nowhere.json")


def a_folder_for_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def index_that_climbs(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))


def index_without_parts(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_an_absolute_path(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "/etc/passwd"}}))


def pickle_by_another_name(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps({"run": "me"}))


def archive_by_another_name(folder):
    torch.save({"run": torch.zeros(1)}, folder / "model.safetensors")


def offsets_of_text(folder):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)


def output_without_sides(folder):
    tensors = load_file(folder / "model.safetensors") | {"visual_projection.weight": torch.tensor(1.0)}
    save_file(tensors, folder / "model.safetensors")


def weights_beside_those_looked_at(folder):
    save_file({"visual_projection.weight": torch.ones(24, 32)}, folder / "other.safetensors")
    edit(folder / "config.json", transformers_weights="other.safetensors")


def pickle_beside_the_weights(folder):
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"run": "me"}))
    edit(folder / "config.json", transformers_weights="adapter_model.bin")


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "acme/other"}')


def kernels_of_the_hub(folder):
    edit(folder / "config.json", attn_implementation="acme/kernels")


def kernels_for_a_part(folder):
    edit(folder / "config.json", attn_implementation={"vision_config": "acme/kernels"})


def kernels_nested(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["_attn_implementation"] = "flash_attention_2"
    (folder / "config.json").write_text(json.dumps(config))


def quantized(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "fp8"})


def no_dim(folder):
    edit(folder / "config.json", projection_dim=None)


def dim_in_words(folder):
    edit(folder / "config.json", projection_dim="many")


def not_a_number(folder):
    edit(folder / "config.json", initializer_factor=float("nan"))


def escape_sequences(folder):
    edit(folder / "config.json", auto_map="evil\n\x1b[2J\ud800.Evil")


HOSTILE = {
    index_of_an_absolute_path: r"index\.json: got no map of tensors to files, expected weight_map, with plain names",
    pickle_by_another_name: r"got a header of \d+ bytes in a file of \d+, expected a safetensors file",
    archive_by_another_name: r"got a header of \d+ bytes in a file of \d+, expected a safetensors file",
    offsets_of_text: r"got no readable header \(ValueError\)",
    output_without_sides: r"got vectors of 24 numbers, expected none, as visual_projection\.weight in the weights has",
    weights_beside_those_looked_at: r"got transformers_weights 'other\.safetensors', expected plain weights in model\.",
    pickle_beside_the_weights: r"got transformers_weights 'adapter_model\.bin', expected plain weights",
    adapter: r"adapter_config\.json: got an adapter, which changes the weights, expected weights alone",
    kernels_of_the_hub: r"got attn_implementation 'acme/kernels', expected plain .* and torch's own attention",
    kernels_for_a_part: r"got attn_implementation \{'vision_config': 'acme/kernels'\}, expected",
    kernels_nested: r"got _attn_implementation 'flash_attention_2', expected .* Take _attn_implementation out, or",
    quantized: r"got quantization_config \{'quant_method': 'fp8'\}, expected plain weights in model\.safetensors",
    no_dim: r"config\.json: got projection_dim None, expected a whole number",
    dim_in_words: r"config\.json: got projection_dim 'many', expected a whole number",
    not_a_number: r"config\.json: got initializer_factor nan, expected at most 16777216",
    escape_sequences: r"own \(evil\\n\\x1b\[2J\\ud800\.Evil\), expected an architecture of transformers itself",
    pickle_only: r"pytorch_model\.bin: got a pickle, which can run code.* Save it as safetensors",
    no_weights: r"model\.safetensors: got no such file",
    cut_off: r"model\.safetensors: got \d+ bytes, expected \d+, as its header says",
    huge_header: r"got a header of 4611686018427387904 bytes in a file of \d+, expected a safetensors file",
    lying_shapes: r"got no readable header \(ValueError\)",
    no_config: r"config\.json: got no such file",
    no_preprocessor: r"preprocessor_config\.json: got no such file, expected the sizes and means",
    garbage_config: r"config\.json: got no JSON \(UnicodeDecodeError\)",
    list_config: r"config\.json: got JSON of type list, expected a JSON object",
    deep_config: r"config\.json: got no JSON \(RecursionError\)",
    huge_config: r"config\.json: got 500\d+ bytes, expected at most 4194304",
    own_code: r"config\.json: got Python code of the model's own .*modeling_evil\.Evil.*TRUST_REMOTE_CODE=",
    own_processor_code: r"preprocessor_config\.json: got Python code of the model's own .*evil\.Evil",
    own_tokenizer_code: r"tokenizer_config\.json: got Python code of the model's own .*evil\.Slow",
    other_architecture: r"got model_type 'llama', expected one of clip, siglip, dinov2, dinov2_with_registers\.",
    naflex: r"got model_type 'siglip2', expected one of .* \(SigLIP 2 at a fixed resolution has the type siglip\)",
    endless_layers: r"got num_hidden_layers 1000000000, expected at most 1024",
    huge_number: r"got projection_dim 10000000000000000000, expected at most 16777216",
    wrong_dim: r"config\.json: got vectors of 8 numbers, expected 24, as visual_projection\.weight in the weights has",
    far_too_large_dim: r"config\.json: got vectors of 2048 numbers, expected 24, as visual_projection\.weight",
    text_for_a_part: r"got vision_config of type str, expected a JSON object",
    link_outside: r"preprocessor_config\.json: got a link that leads out of the folder",
    dangling_link: r"config\.json: got no regular file",
    a_folder_for_weights: r"model\.safetensors: got no regular file",
    index_that_climbs: r"index\.json: got no map of tensors to files, expected weight_map, with plain names",
    index_without_parts: r"00001\.safetensors: got no such file, expected the part that",
}


@pytest.mark.parametrize(("breakage", "words"), HOSTILE.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_hostile_folder_is_refused_before_it_is_loaded(copied_model, breakage, words):
    folder = copied_model("clip")
    breakage(folder)
    settings = Settings(model=str(folder), device="cpu")

    for ask in (embedding_fingerprint, load_model):
        with pytest.raises(ModelFilesError, match=words) as refused:
            ask(settings)
        said = str(refused.value)
        assert said.isprintable()
        assert said.startswith(f"Model '{folder}' can't be loaded from {folder}")
        assert "Nothing was written." in said


def test_a_configuration_nested_a_thousand_deep_is_refused_or_taken_and_no_stack_overflows(copied_model):
    folder = copied_model("clip")
    config = (folder / "config.json").read_text().rstrip()[:-1]
    (folder / "config.json").write_text(f'{config}, "deep": {"[" * 900}{"]" * 900}}}')

    assert inspect_folder("m", folder).dim == 24
    with pytest.raises(ModelFilesError, match=r"transformers can't use \(RecursionError"):
        load_model(Settings(model=str(folder), device="cpu"))


@pytest.mark.parametrize(("value", "fault"), [(float("nan"), "NaN"), (float("inf"), "NaN"), (0.0, "length zero")])
def test_weights_that_make_no_vector_are_refused_when_loading(copied_model, value, fault):
    folder = copied_model("clip")
    tensors = load_file(folder / "model.safetensors")
    tensors["visual_projection.weight"][:] = value
    save_file(tensors, folder / "model.safetensors")

    words = f"got weights that give a plain picture a vector with {fault}, computed in float32, expected finite values"
    with pytest.raises(ModelFilesError, match=words):
        load_model(Settings(model=str(folder), device="cpu"))
    with pytest.raises(ModelFilesError, match=r"in bfloat16, .* Set EXTRACTION_EMBED_DTYPE=float32, or choose another"):
        load_model(Settings(model=str(folder), device="cpu", embed_dtype="bfloat16"))


def test_no_folder_is_refused_with_how_to_write_one(tmp_path):
    with pytest.raises(ModelFilesError, match=r"got no such folder.*a relative folder is written \./folder"):
        embedding_fingerprint(Settings(model=str(tmp_path / "none")))


SMALLER_IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "config.json",
            {"text_config": {"hidden_size": 512}},
            r"weights with \d+ numbers, expected \d+, as its config\.json asks for",
        ),
        ("config.json", {"vision_config": SMALLER_IMAGES}, r"files that transformers can't use \(RuntimeError"),
        ("config.json", {"vision_config": {"hidden_size": 33}}, r"as its config\.json asks for|can't use"),
        ("preprocessor_config.json", {"crop_size": {"height": 64, "width": 64}}, r"can't use \(ValueError"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 10**9}}, r"shortest_edge of 1000000000 px"),
        ("preprocessor_config.json", {"image_std": [0.0, 1.0, 1.0]}, r"image_std \[0\.0, 1\.0, 1\.0\]"),
        ("preprocessor_config.json", {"image_processor_type": "NoSuch"}, r"can't use \(ValueError"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused_when_loading(copied_model, name, changes, words):
    folder = copied_model("clip")
    edit(folder / name, **changes)

    with pytest.raises(ModelFilesError, match=words) as refused:
        load_model(Settings(model=str(folder), device="cpu"))
    assert "\n" not in str(refused.value)


OWN_CODE = """
import torch, transformers

class OwnModel(transformers.PreTrainedModel):
    config_class = transformers.Dinov2Config

    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(3, 5)
        self.post_init()

    def forward(self, pixel_values):
        return self.head(pixel_values.mean((2, 3)))
"""


def test_code_of_a_model_that_was_named_may_run(copied_model, monkeypatch):
    folder = copied_model("dinov2")
    (folder / "modeling_own.py").write_text(OWN_CODE)
    save_file({"head.weight": torch.ones(5, 3), "head.bias": torch.zeros(5)}, folder / "model.safetensors")
    edit(folder / "config.json", auto_map={"AutoModel": "modeling_own.OwnModel"})
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "modules"))
    monkeypatch.syspath_prepend(str(folder.parent / "modules"))
    name = str(folder)

    with pytest.raises(ModelFilesError, match="Python code of the model's own"):
        load_model(Settings(model=name, device="cpu", trust_remote_code=("another/model",)))
    loaded = load_model(Settings(model=name, device="cpu", trust_remote_code=(name,)))
    assert (type(loaded.network).__name__, loaded.dim) == ("OwnModel", 5)


def test_code_that_may_run_is_in_the_fingerprint(copied_model):
    folder = copied_model("dinov2")
    (folder / "parts").mkdir()
    (folder / "parts" / "own.py").write_text("SCALE = 1")
    trusted, plain = (Settings(model=str(folder), trust_remote_code=names) for names in ((str(folder),), ()))
    before = embedding_fingerprint(trusted), embedding_fingerprint(plain)

    (folder / "parts" / "own.py").write_text("SCALE = 2")

    assert embedding_fingerprint(trusted) != before[0]
    assert embedding_fingerprint(plain) == before[1]  # there it never runs


def test_code_of_another_repository_may_not_run_although_the_model_was_named(copied_model):
    folder = copied_model("dinov2")
    edit(folder / "config.json", auto_map={"AutoModel": "acme/other--modeling.Own"})

    words = (
        r"Python code of another repository \(.*acme/other--modeling\.Own.*\), expected code that lies in the folder"
    )
    with pytest.raises(ModelFilesError, match=words):
        load_model(Settings(model=str(folder), device="cpu", trust_remote_code=(str(folder),)))


@pytest.mark.parametrize(
    ("kind", "change"), [("siglip", {"vision_config": {"hidden_size": 48}}), ("dinov2", {"hidden_size": 48})]
)
def test_a_wrong_length_of_vectors_is_refused_of_every_architecture(copied_model, kind, change):
    folder = copied_model(kind)
    edit(folder / "config.json", **change)

    with pytest.raises(ModelFilesError, match=r"got vectors of 48 numbers, expected 32, as .*embedding.*weight in the"):
        embedding_fingerprint(Settings(model=str(folder)))


def test_weights_in_several_files_are_taken_together(saved_models, tmp_path):
    network = AutoModel.from_pretrained(saved_models("clip"))
    network.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "sharded" / name).write_bytes((saved_models("clip") / name).read_bytes())
    parts = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(parts) > 1

    whole, sharded = (inspect_folder("m", path) for path in (saved_models("clip"), tmp_path / "sharded"))
    assert (sharded.num_weights, sharded.dim) == (whole.num_weights, 24)
    assert {"model.safetensors.index.json", *parts} <= sharded.files.keys()
    picture = [np.full((50, 60, 3), 99, np.uint8)]
    vectors = [load_model(Settings(model=str(f.path), device="cpu")).embed_images(picture) for f in (whole, sharded)]
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-5


def test_a_whole_folder_is_described(saved_models):
    described = inspect_folder("m", saved_models("clip"))

    assert (described.model_type, described.dim, described.has_text) == ("clip", 24, True)
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= described.files.keys()
    assert inspect_folder("m", saved_models("dinov2")).has_text is False


def test_links_into_the_blobs_of_a_hub_cache_are_followed(saved_models, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(saved_models("dinov2").iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")

    assert inspect_folder("m", snapshot).dim == 32
