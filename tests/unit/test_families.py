"""Decoder families of transformers, cut into 1, 2 and 3 stages, give the tokens that transformers gives."""

import pytest
from families import FAMILIES, MODERN, SIZES, make_config
from test_generate import decode, prompts, reference


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, save_random):
    """(directory, tokens by record as transformers generates them)."""
    directory = tmp_path_factory.mktemp(request.param)
    model = save_random(directory, make_config(request.param))
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
