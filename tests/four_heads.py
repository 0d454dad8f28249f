"""A random model of 4 heads of 32. The tiny base has 3 heads, which two engines cannot share, and is 96 wide."""

from pathlib import Path

import torch
from tiny import BASE
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM


def save_four_heads(folder: Path | str):
    """Its weights in float32, with the tiny base's tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
