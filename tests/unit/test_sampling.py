"""How tokens are chosen, against transformers' own filters."""

import dataclasses
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpinfer.generate.sampling import Sampling, choose_tokens
from mpinfer.generate.scheduler import Sequence

STOPS = (3, 5)
LAST = 1 - 2**-53  # the largest number that `uniform` gives


class Given(Sampling):
    """Whose random number is told by the test: it is the first part of the seed."""

    def uniform(self, number, position):
        return float(self.seed[0])


def sequence(sampling, prompt=(1, 2), new=(), number=0):
    return Sequence(0, 0, list(prompt), number=number, sampling=sampling, new_tokens=list(new))


def chosen(logits, sequences):
    return [token for token, _ in choose_tokens(logits, sequences)]


def drawn(row, sampling, uniforms, prompt=(1, 2), new=()):
    """The token that each of these random numbers draws from a row of logits."""
    own = [Given(**{**dataclasses.asdict(sampling), "seed": (uniform,)}) for uniform in uniforms]
    return chosen(row.expand(len(own), -1), [sequence(each, prompt, new) for each in own])


def distribution(row, sampling, prompt, new):
    """What transformers' `generate` samples from: its processors, in its order."""
    from transformers import generation

    processors = [
        generation.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        generation.MinNewTokensLengthLogitsProcessor(len(prompt), sampling.min_new_tokens, list(STOPS), device="cpu"),
        generation.TemperatureLogitsWarper(sampling.temperature),
    ]
    if sampling.top_k:
        processors.append(generation.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(generation.TopPLogitsWarper(sampling.top_p))
    processors.append(generation.MinPLogitsWarper(sampling.min_p))
    scores = generation.LogitsProcessorList(processors)(torch.tensor([[*prompt, *new]]), row[None].clone())
    return scores[0].double().softmax(0)


def random_sampling(random, **given):
    filters = {
        "temperature": random.choice([0.3, 1.0, 1.7]),
        "top_k": random.choice([0, 0, 1, 7, 600, 10_000]),
        "top_p": random.choice([1.0, random.uniform(0.05, 0.999)]),
        "min_p": random.choice([0.0, random.uniform(0, 1) ** 2]),
        "repetition_penalty": random.choice([1.0, 0.6, 1.4]),
        "min_new_tokens": random.choice([0, 2]),
    }
    return Sampling(**{"seed": (0,), "forbidden_before": STOPS, **filters, **given})


@pytest.mark.parametrize("vocabulary", [20, 700])
@pytest.mark.parametrize("seed", range(25))
def test_what_can_be_drawn_and_how_often_is_as_in_transformers(seed, vocabulary):
    """Tokens share [0, 1) in the order of the vocabulary. So the ends of each one's part tell all: which tokens have
    one, and how large it is."""
    random = Random(seed)
    torch.manual_seed(seed)
    row = torch.randn(vocabulary) * random.choice([0.2, 2, 5])
    sampling = random_sampling(random)
    prompt = [random.randrange(vocabulary) for _ in range(4)]
    new = [random.randrange(vocabulary) for _ in range(random.randrange(4))]
    expected = distribution(row, sampling, prompt, new)
    ends = expected.cumsum(0)
    rounding = 1e-5
    tokens = (expected > 3 * rounding).nonzero()[:, 0].tolist()
    assert tokens
    for token in tokens:
        begin, end = ends[token] - expected[token], ends[token]
        uniforms = [float(begin) + rounding, float(end) - rounding]
        assert drawn(row, sampling, uniforms, prompt, new) == [token, token]
    possible = expected.nonzero()[:, 0].tolist()
    assert drawn(row, sampling, [0.0, LAST], prompt, new) == [possible[0], possible[-1]]


def test_all_tokens_can_be_drawn_without_filters():
    row = torch.zeros(16)
    uniforms = [(position + 0.5) / 64 for position in range(64)]
    assert drawn(row, Sampling((0,), 1.0), uniforms) == [position // 4 for position in range(64)]


def test_a_draw_takes_the_random_number_of_its_sample_and_position():
    row = torch.zeros(1, 1000)
    sampling = Sampling((0, "record"), 1.0)
    for number in range(3):
        for position in range(5):
            token = int(sampling.uniform(number, position) * 1000)
            assert chosen(row, [sequence(sampling, new=[1] * position, number=number)]) == [token]


def test_random_numbers_depend_on_seed_sample_and_position_only():
    numbers = {
        (seed, number, position): Sampling(seed).uniform(number, position)
        for seed in [(0,), (1,), (0, 0), (0, "0"), (0, "record")]
        for number in range(3)
        for position in range(3)
    }
    assert len(set(numbers.values())) == len(numbers)
    others = Sampling((0, "record"), 0.5, 3, 0.9, 0.1, 1.2, 4, (1,), 2)
    assert all(others.uniform(n, p) == numbers[(0, "record"), n, p] for n in range(3) for p in range(3))


def test_random_numbers_stay_the_same_from_version_to_version():
    """Else a resumed run would mix two."""
    assert Sampling((7, "a")).uniform(1, 2) == 0.05327005807793306


def test_random_numbers_are_spread_evenly():
    draws = [Sampling((0, seed)).uniform(0, at) for seed in range(10) for at in range(1000)]
    assert all(0 <= draw < 1 for draw in draws)
    numbers = torch.tensor(draws)
    assert torch.histc(numbers, 10, 0, 1).sub(1000).abs().max() < 150  # five standard deviations
    assert abs(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]) < 0.05


@pytest.mark.parametrize("vocabulary", [20, 700])
@settings(max_examples=40, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_a_row_is_chosen_as_if_it_were_alone(vocabulary, random):
    """In batches of greedy and sampled rows, with and without log-probabilities; ties, as bfloat16 makes, included."""
    torch.manual_seed(random.randrange(1000))
    rows = random.randint(2, 6)
    logits = (torch.randn(rows, vocabulary) * random.choice([0.2, 2, 5])).to(
        random.choice([torch.float, torch.bfloat16])
    )
    sequences = [
        sequence(
            random_sampling(
                random,
                seed=(0, row),
                temperature=random.choice([0.0, 0.7, 1.5]),
                logprobs=random.choice([None, 0, 3]),
            ),
            new=[random.randrange(vocabulary) for _ in range(random.randrange(4))],
            number=random.randrange(3),
        )
        for row in range(rows)
    ]
    together = choose_tokens(logits.float(), sequences)
    alone = [choose_tokens(logits[row, None].float(), [sequences[row]])[0] for row in range(rows)]
    assert together == alone


def test_a_neighbours_nucleus_takes_no_token_from_a_row_without_one():
    """A token that is so improbable that rounded sums are 1 before it."""
    logits = torch.tensor([[0.0, -20.0], [0.0, 0.0]])
    free, cut = Given((LAST,), temperature=1.0), Given((0.0,), temperature=1.0, top_p=0.5)
    assert chosen(logits[:1], [sequence(free)]) == [1]
    assert chosen(logits, [sequence(free), sequence(cut)]) == [1, 0]


def test_equal_probabilities_at_the_edge_of_the_nucleus_do_not_depend_on_the_neighbours():
    """A flat row beside it makes the whole vocabulary be sorted, and sorting may order equal ones as it likes."""
    row, flat = torch.zeros(700), torch.zeros(700)
    row[300:340] = 9.0
    uniforms = [(position + 0.5) / 50 for position in range(50)]
    nucleus = [Given((uniform,), temperature=1.0, top_p=0.5) for uniform in uniforms]
    alone = chosen(row.expand(50, -1), [sequence(each) for each in nucleus])
    beside = chosen(
        torch.cat([row.expand(50, -1), flat[None]]),
        [sequence(each) for each in [*nucleus, Given((0.5,), temperature=1.0, top_p=0.99)]],
    )
    assert beside[:-1] == alone


def test_logits_are_left_as_they_are():
    logits = torch.randn(2, 20)
    before = logits.clone()
    choose_tokens(logits, [sequence(random_sampling(Random(seed), repetition_penalty=2.0)) for seed in range(2)])
    assert torch.equal(logits, before)


def test_logprobs_are_the_models_own():
    logits = torch.randn(3, 20) * 3
    expected = logits.log_softmax(1)
    options = {"temperature": 1.5, "top_k": 2, "repetition_penalty": 3.0}
    for best in (0, 1, 5):
        results = choose_tokens(logits, [sequence(Sampling((0, n), logprobs=best, **options)) for n in range(3)])
        for row, (token, logprobs) in enumerate(results):
            assert logprobs["logprob"] == pytest.approx(expected[row, token].item(), abs=1e-6)
            order = expected[row].argsort(descending=True)[:best].tolist()
            assert [other for other, _ in logprobs["top"]] == order
            assert [value for _, value in logprobs["top"]] == pytest.approx(expected[row, order].tolist(), abs=1e-6)


def test_more_logprobs_than_tokens_are_all_of_them():
    [(_, logprobs)] = choose_tokens(torch.randn(1, 20), [sequence(Sampling((0,), logprobs=100))])
    assert len(logprobs["top"]) == 20


@pytest.mark.parametrize(("prompt", "new", "best"), [([8], [], 4), ([1], [8], 4), ([8], [4], 8), ([1], [1], 8)])
def test_tokens_of_the_prompt_and_new_ones_are_penalized_once(prompt, new, best):
    row = torch.full((10,), -5.0)
    row[8], row[4] = 3.0, 2.0  # apart by less than the penalty, which is not applied for every repetition
    sampling = Sampling((0,), repetition_penalty=2.0)
    assert chosen(row[None], [sequence(sampling, prompt * 3, new * 3)]) == [best]


def test_a_penalty_lowers_negative_logits_too():
    row = torch.tensor([-1.0, -1.5])
    assert chosen(row[None], [sequence(Sampling((0,), repetition_penalty=2.0), prompt=[0])]) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_tokens_are_forbidden_until_there_are_enough(temperature):
    row = torch.full((10,), -20.0)
    row[list(STOPS)] = 20.0
    sampling = Sampling((0,), temperature, min_new_tokens=2, forbidden_before=STOPS)
    assert [chosen(row[None], [sequence(sampling, new=[1] * length)])[0] in STOPS for length in range(4)] == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("stops", [(), (10,), (3, 1_000_000)])
def test_stop_tokens_may_be_none_or_outside_the_vocabulary(stops):
    row = torch.zeros(10)
    row[3] = 1.0
    sampling = Sampling((0,), min_new_tokens=2, forbidden_before=stops)
    assert chosen(row[None], [sequence(sampling)]) == [0 if 3 in stops else 3]


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-60])
def test_a_temperature_near_zero_gives_the_best_token(temperature):
    row = torch.tensor([-50.0, 90.0, 89.0, -3.0])
    assert drawn(row, Sampling((0,), temperature), [0.0, 0.5, LAST]) == [1, 1, 1]


@pytest.mark.parametrize("temperature", [1e20, 1e300, float("inf")])
def test_a_temperature_without_end_gives_all_tokens_alike(temperature):
    row = torch.tensor([-50.0, 90.0, 89.0, -3.0, 7.0])
    sampling = Sampling((0,), temperature, min_new_tokens=1, forbidden_before=(4,))
    assert drawn(row, sampling, [0.1, 0.3, 0.6, 0.9]) == [0, 1, 2, 3]
