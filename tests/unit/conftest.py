"""Small random models for unit tests."""

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny, and threads that wait for each other on a busy machine are slow


def _save(directory, config, shard_size="50KB"):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)  # large enough that logits are far apart
    model.save_pretrained(directory, max_shard_size=shard_size)
    return model


@pytest.fixture(scope="session")
def save_random():
    """Save a random model of a config to a directory; returns the model."""
    return _save


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """(directory, transformers model) of a Llama with uneven heads, tied embeddings and several shards."""
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    return directory, _save(directory, config)


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory):
    """The same for a Mistral whose attention sees 8 tokens back, with an embedding and a head of their own."""
    from transformers import MistralConfig

    directory = tmp_path_factory.mktemp("tiny-mistral")
    config = MistralConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        sliding_window=8,
        tie_word_embeddings=False,
        eos_token_id=2,
    )
    return directory, _save(directory, config)
