"""Decoder families of transformers, cut into 1, 2 and 3 stages, give the tokens that transformers gives."""

import pytest
from test_generate import decode, prompts, reference

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


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, save_random):
    """(directory, tokens by record as transformers generates them)."""
    import transformers

    config = getattr(transformers, f"{request.param}Config")(**FAMILIES[request.param])
    directory = tmp_path_factory.mktemp(request.param)
    model = save_random(directory, config)
    return directory, {index: reference(model, prompt) for index, prompt in enumerate(prompts())}


@pytest.mark.parametrize("cuts", [(0, 5), (0, 2, 5), (0, 1, 3, 5)])
def test_family(family, cuts):
    directory, tokens = family
    assert decode(directory, cuts, groups=len(cuts) - 1, micro_batch=3, step_tokens=16) == tokens


@pytest.mark.parametrize(
    ("name", "words"),
    [("Bloom", "no pipeline plan"), ("Bert", "cannot be cut safely"), ("GptOss", "'s_aux' is not built")],
)
def test_what_cannot_be_cut_is_refused_with_a_reason(name, words, tmp_path, save_random):
    import transformers

    from mpinfer.errors import ModelError

    sizes = {**MODERN, "head_dim": 16, "num_local_experts": 4} if name == "GptOss" else SIZES
    save_random(tmp_path, getattr(transformers, f"{name}Config")(**sizes))
    with pytest.raises(ModelError, match=words):
        decode(tmp_path, (0, 5), groups=1, micro_batch=3, step_tokens=16)
