"""Small random models for unit tests."""

import families
import pytest
import torch

torch.set_num_threads(1)  # the models are tiny, and threads that wait for each other on a busy machine are slow


@pytest.fixture(scope="session")
def save_random():
    """Save a random model of a config to a directory; returns the model."""
    return families.save_random


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
    return directory, families.save_random(directory, config)


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
    return directory, families.save_random(directory, config)
