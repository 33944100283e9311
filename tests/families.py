"""The decoder families that are held against transformers, as small random models."""

from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 128,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODERN = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}
FAMILIES = {
    "Mistral": {**MODERN, "sliding_window": 8},
    "Qwen2": MODERN,
    "Qwen3": {**MODERN, "head_dim": 16},
    "Gemma2": {**MODERN, "head_dim": 16, "sliding_window": 8},
    "Gemma3Text": {**MODERN, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "Phi": MODERN,
    "Phi3": MODERN,
    "Olmo2": MODERN,
    "Granite": MODERN,
    "Cohere": MODERN,
    "GPT2": {"vocab_size": 128, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "eos_token_id": 2},
    "GPTNeoX": {**SIZES, "intermediate_size": 96, "max_position_embeddings": 128},
    "OPT": {**SIZES, "ffn_dim": 96, "max_position_embeddings": 128, "word_embed_proj_dim": 24},
    "Mixtral": {**MODERN, "num_local_experts": 4},
    "Qwen3Moe": {**MODERN, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def make_config(family: str) -> Any:
    import transformers

    return getattr(transformers, f"{family}Config")(**FAMILIES[family])


def save_random(directory: Path, config: Any, shard_size: str = "50KB") -> Any:
    """Save a random model of a config to a directory; returns the model."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)  # large enough that logits are far apart
    model.save_pretrained(directory, max_shard_size=shard_size)
    return model
