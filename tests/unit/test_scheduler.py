"""The scheduler of sequences, against a model that is easy to believe."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mpinfer.generate.scheduler import Scheduler, Segment, Sequence

STOP = 99


def scheduler(groups=1, micro_batch=2, step_tokens=4, max_new_tokens=3, max_length=100):
    return Scheduler(groups, micro_batch, step_tokens, max_new_tokens, max_length, {STOP})


def sequence(index, length):
    return Sequence(index, index, list(range(1, length + 1)))


def test_a_long_prompt_is_prefilled_in_chunks_and_samples_only_at_its_end():
    books = scheduler(micro_batch=1)
    books.add(sequence(0, 6))
    assert books.next_step(0).segments == (Segment(0, 0, 4, False),)
    assert books.commit(0, []) == []
    step = books.next_step(0)
    assert step.segments == (Segment(0, 4, 2, True),)
    assert step.tokens == (5, 6)
    books.commit(0, [50])
    assert books.next_step(0).segments == (Segment(0, 6, 1, True),)


def test_decoding_comes_first_and_prompts_fill_the_rest_of_the_budget():
    books = scheduler()
    books.add(sequence(0, 2))
    books.next_step(0)
    books.commit(0, [50])
    books.add(sequence(1, 9))
    step = books.next_step(0)
    assert step.segments == (Segment(0, 2, 1, True), Segment(1, 0, 3, False))
    assert step.tokens == (50, 1, 2, 3)


def test_finish_reasons_and_slot_reuse():
    books = scheduler(micro_batch=1, max_new_tokens=2)
    for index in range(2):
        books.add(sequence(index, 2))
    books.next_step(0)
    (done,) = books.commit(0, [STOP])
    assert (done.index, done.finish_reason, done.new_tokens) == (0, "stop", [STOP])
    assert books.next_step(0).segments == (Segment(0, 0, 2, True),)  # the next one in the same slot
    books.commit(0, [7])
    books.next_step(0)
    (done,) = books.commit(0, [8])
    assert (done.finish_reason, done.new_tokens) == ("length", [7, 8])
    assert books.next_step(0) is None


def test_a_sequence_ends_at_the_models_length():
    books = scheduler(max_length=4)
    books.add(sequence(0, 3))
    books.next_step(0)
    (done,) = books.commit(0, [7])
    assert done.finish_reason == "length"


def test_few_sequences_are_spread_over_the_groups():
    books = scheduler(groups=2, micro_batch=4, step_tokens=100)
    for index in range(4):
        books.add(sequence(index, 2))
    assert len(books.next_step(0).segments) == 2
    assert len(books.next_step(1).segments) == 2


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False))
def test_every_sequence_is_computed_once_token_by_token(random):
    """Whatever the sizes: each sequence sees its own tokens at consecutive positions, budgets hold, none is lost."""
    groups = random.randint(1, 3)
    micro_batch = random.randint(1, 4)
    step_tokens = random.randint(micro_batch, 12)
    max_new = random.randint(1, 4)
    lengths = [random.randint(1, 20) for _ in range(random.randint(1, 12))]
    books = scheduler(groups, micro_batch, step_tokens, max_new)
    waiting = [sequence(index, n) for index, n in enumerate(lengths)]
    owner, finished = {}, []
    while waiting or books.unfinished:
        if waiting and random.random() < 0.5:
            books.add(waiting.pop(0))
        for group in range(groups):
            step = books.next_step(group)
            if step is None:
                continue
            assert len(step.tokens) == sum(s.length for s in step.segments) <= step_tokens
            assert len({s.slot for s in step.segments}) == len(step.segments)
            tokens, samples = iter(step.tokens), []
            for segment in step.segments:
                assert group * micro_batch <= segment.slot < (group + 1) * micro_batch
                if segment.start == 0:
                    owner[segment.slot] = []
                part = [next(tokens) for _ in range(segment.length)]
                assert segment.start == len(owner[segment.slot])
                owner[segment.slot] += part
                if segment.sample:
                    samples.append(random.randint(1000, 2000))
            for done in books.commit(group, samples):
                assert done.new_tokens[:-1] == owner[done.slot][len(done.prompt) :]
                assert owner[done.slot][: len(done.prompt)] == done.prompt
                assert len(done.new_tokens) == max_new
                finished.append(done.index)
    assert sorted(finished) == list(range(len(lengths)))
