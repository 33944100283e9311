"""The scheduler of sequences, against a model that is easy to believe."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mpinfer.generate.scheduler import Limits, Scheduler, Segment, Sequence

STOP = 99


def scheduler(groups=1, micro_batch=2, step_tokens=4, max_length=100, kv_tokens=10_000):
    return Scheduler(groups, micro_batch, step_tokens, max_length, kv_tokens)


def sequence(index, length, max_new=3):
    return Sequence(index, index, list(range(1, length + 1)), Limits(max_new, {STOP}))


def picks(*tokens):
    """Results of samples, as the task generate makes them."""
    return [(token, None) for token in tokens]


def test_a_long_prompt_is_prefilled_in_chunks_and_samples_only_at_its_end():
    books = scheduler(micro_batch=1)
    books.add(sequence(0, 6))
    assert books.next_step(0).segments == (Segment(0, 0, 4, 0),)
    assert books.commit(0, picks()) == []
    step = books.next_step(0)
    assert step.segments == (Segment(0, 4, 2, 1),)
    assert step.tokens == (5, 6)
    books.commit(0, picks(50))
    assert books.next_step(0).segments == (Segment(0, 6, 1, 1),)


def test_decoding_comes_first_and_prompts_fill_the_rest_of_the_budget():
    books = scheduler()
    books.add(sequence(0, 2))
    books.next_step(0)
    books.commit(0, picks(50))
    books.add(sequence(1, 9))
    step = books.next_step(0)
    assert step.segments == (Segment(0, 2, 1, 1), Segment(1, 0, 3, 0))
    assert step.tokens == (50, 1, 2, 3)


def test_finish_reasons_and_slot_reuse():
    books = scheduler(micro_batch=1)
    for index in range(2):
        books.add(sequence(index, 2, max_new=2))
    books.next_step(0)
    (done,) = books.commit(0, picks(STOP))
    assert (done.index, done.finish_reason, done.new_tokens) == (0, "stop", [STOP])
    assert books.next_step(0).segments == (Segment(0, 0, 2, 1),)  # the next one in the same slot
    books.commit(0, picks(7))
    books.next_step(0)
    (done,) = books.commit(0, picks(8))
    assert (done.finish_reason, done.new_tokens) == ("length", [7, 8])
    assert books.next_step(0) is None


def test_a_sequence_ends_at_the_models_length():
    books = scheduler(max_length=4)
    books.add(sequence(0, 3))
    books.next_step(0)
    (done,) = books.commit(0, picks(7))
    assert done.finish_reason == "length"


def test_few_sequences_are_spread_over_the_groups():
    books = scheduler(groups=2, micro_batch=4, step_tokens=100)
    for index in range(4):
        books.add(sequence(index, 2))
    assert len(books.next_step(0).segments) == 2
    assert len(books.next_step(1).segments) == 2


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_every_sequence_is_computed_once_token_by_token(random):
    """Whatever the sizes: each sequence sees its own tokens at consecutive positions, the budgets of steps and of KV
    memory hold, a sequence that was preempted begins again, none is lost."""
    groups = random.randint(1, 3)
    micro_batch = random.randint(1, 4)
    step_tokens = random.randint(micro_batch, 12)
    max_new = random.randint(1, 4)
    kv_tokens = random.choice([24, 40, 1000])
    lengths = [random.randint(1, 20) for _ in range(random.randint(1, 12))]
    books = scheduler(groups, micro_batch, step_tokens, kv_tokens=kv_tokens)
    waiting = [sequence(index, n, max_new) for index, n in enumerate(lengths)]
    cached, finished, in_flight = {}, [], set()
    while waiting or books.unfinished:
        if waiting and random.random() < 0.5:
            books.add(waiting.pop(0))
        for group in range(groups):
            if group in in_flight:
                in_flight.remove(group)
                owners = books.sampling(group)
                for done in books.commit(group, picks(*(random.randint(1000, 2000) for _ in owners))):
                    assert len(done.new_tokens) == max_new
                    assert cached[done.slot] == (done.prompt + done.new_tokens)[:-1]
                    finished.append(done.index)
            step = books.next_step(group)
            if step is None:
                continue
            in_flight.add(group)
            for slot in step.released:
                cached[slot] = []
            assert len(step.tokens) == sum(s.length for s in step.segments) <= step_tokens
            assert len({s.slot for s in step.segments}) == len(step.segments)
            tokens = iter(step.tokens)
            for segment in step.segments:
                assert group * micro_batch <= segment.slot < (group + 1) * micro_batch
                assert segment.start == len(cached.setdefault(segment.slot, []))
                cached[segment.slot] += [next(tokens) for _ in range(segment.length)]
            assert sum(map(len, cached.values())) <= kv_tokens
    assert sorted(finished) == list(range(len(lengths)))
    assert books.held_tokens == 0


def test_a_sequence_that_finds_no_room_waits():
    books = scheduler(step_tokens=100, kv_tokens=60)
    for index in range(2):
        books.add(sequence(index, 20))  # both alone have room, together they would not with what they may grow by
    assert len(books.next_step(0).segments) == 1
    for token in (5, 6, 7):
        finished = books.commit(0, picks(token))
        step = books.next_step(0)
    assert [done.index for done in finished] == [0]
    assert step.segments == (Segment(0, 0, 20, 1),)


def test_the_youngest_is_preempted_and_computes_its_tokens_again():
    books = scheduler(step_tokens=100, kv_tokens=50)
    for index in range(2):
        books.add(sequence(index, 5, max_new=40))
    books.next_step(0)
    preempted = None
    for token in range(200, 260):
        finished = books.commit(0, picks(*([token] * len(books.sampling(0)))))
        step = books.next_step(0)
        if books.preemptions and preempted is None:
            preempted = len(step.segments), step.released
        if finished and finished[0].index == 0:
            break
    assert preempted == (1, (1,))
    assert books.preemptions == 1
    assert step.segments == (Segment(0, 0, 26, 1),)  # its prompt and the 21 tokens it had
    assert step.tokens == (1, 2, 3, 4, 5, *range(200, 221))


def test_a_prompt_that_is_scored_gives_a_result_for_every_sample():
    books = scheduler(step_tokens=4)
    books.add(Sequence(0, 0, [1, 2, 3, 4, 5, 6], sample_from=2, targets=[3, 4, 5, 9]))
    step = books.next_step(0)
    assert (step.segments, step.targets) == ((Segment(0, 0, 4, 2),), (3, 4))
    assert books.commit(0, ["a", "b"]) == []
    step = books.next_step(0)
    assert (step.segments, step.targets) == ((Segment(0, 4, 2, 2),), (5, 9))
    (done,) = books.commit(0, ["c", "d"])
    assert done.results == ["a", "b", "c", "d"]
