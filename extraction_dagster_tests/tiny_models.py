"""Tiny models with random weights, saved as transformers saves them; the same weights at every call."""

from __future__ import annotations

import json

TEXTS = ["a red bus in the rain", "two cats", "sailing boats at sunset", "a man plays the guitar on a stage"]
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_clip(folder):
    """CLIP with vectors of 24 numbers, a byte-pair tokenizer, the shortest edge resized to 32 and cropped."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(1)
    size = _clip_tokenizer(folder)
    text = _TEXT | {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    CLIPModel(CLIPConfig(vision_config=_VISION, text_config=text, projection_dim=24)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_siglip(folder):
    """SigLIP with vectors of 32 numbers, texts of 64 tokens as transformers' pipeline wants them."""
    import torch
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    torch.manual_seed(2)
    size = _siglip_tokenizer(folder)
    text = _TEXT | {"vocab_size": size, "max_position_embeddings": 64}
    SiglipModel(SiglipConfig(vision_config=_VISION, text_config=text)).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_siglip2(folder):
    """SigLIP 2 at a fixed resolution: SigLIP's network, Gemma's tokenizer, the bilinear filter."""
    import torch
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    torch.manual_seed(4)
    text = _TEXT | {"vocab_size": _gemma_tokenizer(folder), "max_position_embeddings": 64}
    SiglipModel(SiglipConfig(vision_config=_VISION, text_config=text)).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=2).save_pretrained(folder)
    return folder


def save_dinov2(folder):
    """DINOv2 with vectors of 32 numbers, the shortest edge resized to 40 and 32x32 cropped out of the middle."""
    import torch
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(3)
    vision = {name: value for name, value in _VISION.items() if name != "intermediate_size"}
    Dinov2Model(Dinov2Config(**vision)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


SAVE = {"clip": save_clip, "siglip": save_siglip, "siglip2": save_siglip2, "dinov2": save_dinov2}


def _clip_tokenizer(folder):
    """Letters only, each as itself and as a word's end: enough to tell texts apart."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: n for n, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    return len(pieces)


def _siglip_tokenizer(folder):
    import sentencepiece  # noqa: PLC0415 - only where this tokenizer is made
    from transformers import SiglipTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 8),
        model_prefix=str(folder / "spiece"),
        vocab_size=64,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=-1,
        eos_id=1,
        unk_id=2,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    tokenizer = SiglipTokenizer(vocab_file=str(folder / "spiece.model"), model_input_names=["input_ids"])
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _gemma_tokenizer(folder):
    """Letters only, capitals among them: they are other tokens than small letters."""
    from transformers import GemmaTokenizer

    small = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\N{LOWER ONE EIGHTH BLOCK}", *small, *small.upper()]
    tokenizer = GemmaTokenizer(
        vocab={piece: n for n, piece in enumerate(pieces)},
        merges=[],
        padding_side="right",
        model_input_names=["input_ids"],
    )
    tokenizer.save_pretrained(folder)
    return len(pieces)
