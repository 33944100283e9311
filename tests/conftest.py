"""Options, markers, and the fixtures that the tests with MPI share: environments, a small model, its runs."""

import functools
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from harness import (
    MAX_NEW_TOKENS,
    Mpi,
    Tiny,
    complete_run,
    find_mpis,
    generate_reference,
    one_thread,
    require,
    write_jsonl,
)

VOCABULARY = 256
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
_WITH_MPI = ("mpi", "faults")  # directories


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--restarts", type=int, default=0, metavar="N", help="kill one run N times in a row")
    parser.addoption("--kills", type=int, default=0, metavar="N", help="kill ranks at N random moments")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "mpi: starts worlds of ranks; `-m 'not mpi'` leaves the unit tests")
    config.addinivalue_line("markers", "slow: takes many minutes; runs with --run-slow only")


def pytest_report_header(config: pytest.Config) -> str:
    return "MPI: " + ", ".join(f"{mpi.name} in {mpi.bin_dir}" for mpi in find_mpis())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in _WITH_MPI:
            item.add_marker("mpi")
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --run-slow"))


@pytest.fixture
def sample(request: pytest.FixtureRequest) -> Callable[[bool], None]:
    """Leaves out of the ordinary suite those cases of a test for which it is called with False."""

    def keep(ordinary: bool) -> None:
        if not ordinary and not request.config.getoption("--run-slow"):
            pytest.skip("slow: give --run-slow")

    return keep


@pytest.fixture(params=find_mpis(), ids=lambda mpi: mpi.name)
def mpi(request: pytest.FixtureRequest) -> Mpi:
    """Every MPI in turn."""
    return require(request.param)


@pytest.fixture(scope="session")
def one_mpi() -> Mpi:
    """For what cannot depend on the MPI library."""
    return require(find_mpis()[0])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build_tiny(tmp_path_factory.mktemp("tiny"), tied=True)


@pytest.fixture(scope="session")
def tiny_untied(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build_tiny(tmp_path_factory.mktemp("tiny-untied"), tied=False)


@pytest.fixture(scope="session")
def chatty(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a tokenizer of bytes and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("chatty") / "chatty"
    shutil.copytree(tiny.model, directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: id for id, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def run_layout(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run the small job under a layout, once a session; returns the output directory."""

    @functools.cache
    def run(mpi: Mpi, replicas: int, stages: int, *overrides: str) -> Path:
        output = tmp_path_factory.mktemp("run") / "out"
        layout = (f"parallel.replicas={replicas}", f"parallel.stages={stages}")
        return complete_run(mpi, replicas * stages, tiny.job, output, *layout, *overrides)

    return run


def build_tiny(directory: Path, tied: bool) -> Tiny:
    """Prompts around and far beyond steps of 32 tokens: they are prefilled in chunks. Groups of 3 against 24
    records: sequences join and leave."""
    random = Random(0)
    lengths = [1, 2, 17, 31, 32, 33, 80, 120] * 3
    random.shuffle(lengths)
    prompts = [[random.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
    model = _random_model(tied)
    with one_thread():
        # A stop token that some of the sequences meet.
        free = generate_reference(model, prompts, MAX_NEW_TOKENS)
        [(stop, _)] = Counter(token for reference in free for token in set(reference.tokens[:-1])).most_common(1)
        model.config.eos_token_id = model.generation_config.eos_token_id = stop
        tiny = Tiny(directory, prompts, generate_reference(model, prompts, MAX_NEW_TOKENS))
    model.save_pretrained(tiny.model, max_shard_size="300KB")
    write_jsonl(tiny.records, [{"id": f"record {n}", "token_ids": prompt} for n, prompt in enumerate(prompts)])
    tiny.job.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(tiny.model)},
                "input": {"path": str(tiny.records)},
                "output": {"path": str(directory / "out")},
                "parallel": {"micro_batch": 3},
                "generate": {"max_new_tokens": MAX_NEW_TOKENS, "step_tokens": 32},
            }
        )
    )
    return tiny


def _random_model(tied: bool) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # large: logits far apart, and outputs that vary
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()
