"""A tiny Transformers CLIP model with random weights, a tokenizer of single letters and an image processor."""

import json
from pathlib import Path

from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
VISION_TOWER = {**TOWER, "image_size": 16, "patch_size": 4}


def save_clip(folder: Path) -> None:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    special = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    text = {**TOWER, "vocab_size": len(tokens), "max_position_embeddings": 16, **special}
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION_TOWER, projection_dim=16)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": 16}
    CLIPImageProcessor(**size, image_mean=MEAN, image_std=STD).save_pretrained(folder)
