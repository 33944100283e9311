"""The tasks, in one process: any cut, any batching, the same results; and against transformers."""

import functools
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_generate import Records, load, prompts, reference, run

from mpinfer.errors import RecordError
from mpinfer.generate.readout import NoReadout
from mpinfer.generate.scheduler import Scheduler
from mpinfer.generate.tasks import make_task, readout_kind
from mpinfer.generate.text import Text
from mpinfer.models.decoder import DecoderSkeleton
from mpinfer.records.rules import RecordRules
from mpinfer.spec import spec_from_dict

LENGTH = 64  # most tokens of a sequence
CUTS = {1: (0, 6), 2: (0, 3, 6), 3: (0, 2, 4, 6)}  # by number of stages
SAMPLED = {"temperature": 2.0, "top_p": 0.95, "top_k": 60, "max_new_tokens": 20}
TOLERANCE = {"rel": 1e-4, "abs": 1e-4}
LAYOUTS = [  # stages, groups, micro_batch, step_tokens
    (1, 1, 1, 256),
    (1, 1, 8, 16),
    (1, 2, 3, 5),
    (2, 2, 2, 16),
    (2, 3, 1, 3),
    (3, 3, 4, 7),
]


class Whole(Records):
    """All sequences of some records."""

    def __init__(self, task, records):
        self.of_records = [task.sequences(n, r.get("id", n), json.dumps(r)) for n, r in enumerate(records)]
        super().__init__(sequence for own in self.of_records for sequence in own)

    def finish(self, sequences):
        for sequence in sequences:
            sequence.finished = True


@functools.cache
def load_parts(directory, stages, with_head):
    return [load(directory, CUTS[stages], stage, with_head) for stage in range(stages)]


def prepare(directory, task, records, **sections):
    """(task, kind of readout) of a job."""
    tree = {"model": {"path": str(directory), "task": task}, "input": {"path": "records.jsonl"}, **sections}
    spec = spec_from_dict(tree)
    rules = RecordRules(spec)
    assert [problem for record in records if (problem := rules.problem(record))] == []
    skeleton = DecoderSkeleton(directory, "float32")
    return make_task(spec, skeleton, LENGTH, rules.needs_logits), readout_kind(spec, rules.needs_logits)


def compute(directory, name, records, layout=(1, 1, 4, 64), kv_tokens=10_000, **sections):
    """Outputs of the records of a task, and how often a sequence was preempted."""
    stages, groups, micro_batch, step_tokens = layout
    task, kind = prepare(directory, name, records, **sections)
    scheduler = Scheduler(groups, micro_batch, max(step_tokens, micro_batch), LENGTH, kv_tokens)
    source = Whole(task, records)
    parts = load_parts(directory, stages, kind is not NoReadout)
    run(parts, scheduler, groups, groups * micro_batch, source, task, kind, LENGTH)
    assert all(sequence.finished for own in source.of_records for sequence in own)
    return SimpleNamespace(outputs=[task.output(own) for own in source.of_records], preemptions=scheduler.preemptions)


def generate(directory, records, layout=(1, 1, 4, 64), kv_tokens=10_000, **options):
    return compute(directory, "generate", records, layout, kv_tokens, generate=options).outputs


def records_of(tokens):
    return [{"token_ids": ids} for ids in tokens]


def refusal(directory, name, record, **sections):
    task, _ = prepare(directory, name, [record], **sections)
    with pytest.raises(RecordError) as caught:
        task.sequences(0, 0, json.dumps(record))
    message = str(caught.value)
    assert "\n" not in message
    return message


@torch.inference_mode()
def logprobs_of(model, ids):
    """[tokens, vocabulary]: of the token behind each."""
    return model(torch.tensor([ids])).logits[0].log_softmax(-1)


# -- generate


def sampled_records():
    """Some with samples of their own number, seed or filters, and a greedy one."""
    own = [{}, {"n": 3}, {"seed": 5}, {"top_p": 0.5, "logprobs": 2}, {"temperature": 0, "n": 1}, {"min_new_tokens": 9}]
    return [{"token_ids": ids, "generate": own[n % len(own)]} for n, ids in enumerate(prompts())]


def without_logprobs(outputs):
    """They are rounded otherwise in other layouts."""
    samples = [output.get("samples", [output]) for output in outputs]
    return [[{key: value for key, value in s.items() if key != "logprobs"} for s in own] for own in samples]


@functools.cache
def sampled_one_by_one(directory):
    return without_logprobs(generate(directory, sampled_records(), (1, 1, 1, 256), n=2, **SAMPLED))


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
@pytest.mark.parametrize("kv_tokens", [10_000, LENGTH])
def test_sampled_tokens_do_not_depend_on_the_layout(tiny_llama, layout, kv_tokens):
    directory, _ = tiny_llama
    made = compute(directory, "generate", sampled_records(), layout, kv_tokens, generate={"n": 2, **SAMPLED})
    assert without_logprobs(made.outputs) == sampled_one_by_one(directory)
    assert (made.preemptions > 0) == (kv_tokens == LENGTH)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_preempted_sequences_get_the_tokens_of_transformers(tiny_llama, layout):
    directory, model = tiny_llama
    short = [ids[:9] for ids in prompts()]
    made = compute(directory, "generate", records_of(short), layout, LENGTH, generate={"max_new_tokens": 30})
    assert made.preemptions > 0
    assert [output["token_ids"] for output in made.outputs] == [
        reference(model, ids, max_new_tokens=30) for ids in short
    ]


def test_samples_and_records_and_seeds_differ(tiny_llama):
    directory, _ = tiny_llama
    same = records_of([[5, 6, 7]] * 2)
    outputs = [generate(directory, same, n=4, seed=seed, **SAMPLED) for seed in (0, 1)]
    texts = [tuple(s["token_ids"]) for output in outputs for record in output for s in record["samples"]]
    assert len(set(texts)) == len(texts) == 16


def test_a_seed_of_its_own_makes_a_record_independent_of_its_id_and_of_the_jobs_seed(tiny_llama):
    directory, _ = tiny_llama

    def tokens(id, own, seed):
        record = {"id": id, "token_ids": [5, 6, 7], "generate": own}
        return generate(directory, [record], seed=seed, **SAMPLED)[0]["token_ids"]

    assert tokens("a", {"seed": 3}, 0) == tokens("b", {"seed": 3}, 1)
    assert tokens("a", {"seed": 3}, 0) != tokens("a", {"seed": 4}, 0)
    assert tokens("a", {}, 0) != tokens("b", {}, 0)
    assert tokens(1, {}, 0) != tokens("1", {}, 0)


def test_records_may_be_greedy_in_a_job_that_samples_and_the_other_way_round(tiny_llama):
    directory, model = tiny_llama
    own = [{}, {"temperature": 0.0}] * 4
    records = [{"token_ids": ids, "generate": o} for ids, o in zip(prompts(), own, strict=True)]
    sampling = generate(directory, records, (2, 2, 2, 16), **SAMPLED)
    greedy = [output["token_ids"] for output in sampling[1::2]]
    assert greedy == [reference(model, ids, max_new_tokens=20) for ids in prompts()[1::2]]
    other = [{"token_ids": ids, "generate": SAMPLED if not o else {}} for ids, o in zip(prompts(), own, strict=True)]
    assert generate(directory, other, (2, 2, 2, 16), max_new_tokens=20) == sampling


@pytest.mark.parametrize("stages", CUTS)
def test_greedy_tokens_with_penalty_and_least_length_equal_transformers(tiny_llama, stages):
    directory, model = tiny_llama
    stops = sorted({reference(model, ids)[0] for ids in prompts()})  # each would stop at once
    options = {"repetition_penalty": 1.7, "min_new_tokens": 4, "max_new_tokens": 9}
    outputs = generate(directory, records_of(prompts()), (stages, stages, 2, 16), stop_token_ids=stops, **options)
    expected = [reference(model, ids, eos_token_id=[2, *stops], pad_token_id=0, **options) for ids in prompts()]
    assert [output["token_ids"] for output in outputs] == expected
    assert expected != [reference(model, ids, **{**options, "repetition_penalty": 1.0}) for ids in prompts()]
    lengths = {len(ids) for ids in expected}
    assert min(lengths) > 4
    for output in outputs:
        assert output["finish_reason"] == ("stop" if output["token_ids"][-1] in {2, *stops} else "length")


def test_a_record_ends_at_its_own_stop_token_and_length(tiny_llama):
    directory, model = tiny_llama
    ids = prompts()[3]
    free = reference(model, ids)
    assert len(set(free)) > 3
    stop = free[2]
    end = free.index(stop) + 1
    own = [{}, {"stop_token_ids": [stop]}, {"max_new_tokens": 2}, {"stop_token_ids": stop, "max_new_tokens": end}]
    outputs = generate(directory, [{"token_ids": ids, "generate": o} for o in own], max_new_tokens=len(free))
    assert [output["token_ids"] for output in outputs] == [free, free[:end], free[:2], free[:end]]
    assert [output["finish_reason"] for output in outputs[1:]] == ["stop", "length", "stop"]
    assert [output["prompt_tokens"] for output in outputs] == [len(ids)] * 4


@pytest.mark.parametrize("stages", CUTS)
def test_logprobs_of_new_tokens_equal_transformers(tiny_llama, stages):
    directory, model = tiny_llama
    outputs = generate(directory, records_of(prompts()), (stages, stages, 2, 16), logprobs=3, **SAMPLED)
    for ids, output in zip(prompts(), outputs, strict=True):
        tokens, logprobs = output["token_ids"], output["logprobs"]
        expected = logprobs_of(model, ids + tokens)[len(ids) - 1 : -1]
        chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        assert [each["logprob"] for each in logprobs] == pytest.approx(chosen, **TOLERANCE)
        best = expected.topk(3)
        assert [[token for token, _ in each["top"]] for each in logprobs] == best.indices.tolist()
        for each, values in zip(logprobs, best.values.tolist(), strict=True):
            assert [value for _, value in each["top"]] == pytest.approx(values, **TOLERANCE)
        assert [each["text"] for each in logprobs] == [f"token_id:{token}" for token in tokens]


def test_nobody_is_asked_for_logits_where_the_best_token_will_do(tiny_llama):
    directory, _ = tiny_llama
    assert prepare(directory, "generate", records_of([[1]]))[1].width(64) == 2
    for own in ({"temperature": 1}, {"logprobs": 0}, {"repetition_penalty": 2}, {"min_new_tokens": 1}):
        assert prepare(directory, "generate", [{"token_ids": [1], "generate": own}])[1].width(64) == 64


# -- text


def save_tokenizer(directory, beginning):
    """A byte-level one whose words know their blank, as GPT-2's do; `beginning`: whether texts get a token before."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefgh", k=letters.randint(1, 4))) for _ in range(4000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=128, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    assert tokenizer.get_vocab_size() == 128
    if beginning:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(directory)
    return fast


def with_tokenizer(tiny_llama, tmp_path_factory, beginning):
    directory, model = tiny_llama
    copy = tmp_path_factory.mktemp("texts") / "model"
    shutil.copytree(directory, copy)
    return SimpleNamespace(directory=copy, model=model, tokenizer=save_tokenizer(copy, beginning))


@pytest.fixture(scope="module")
def texts(tiny_llama, tmp_path_factory):
    """A model directory with a tokenizer, and both."""
    return with_tokenizer(tiny_llama, tmp_path_factory, beginning=False)


@pytest.fixture(scope="module")
def texts_with_beginning(tiny_llama, tmp_path_factory):
    return with_tokenizer(tiny_llama, tmp_path_factory, beginning=True)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("stages", CUTS)
def test_text_ends_before_a_stop_string(texts, stages, temperature):
    records = [{"prompt": "abc de", "generate": {"seed": 1}}, {"prompt": "gh fab", "generate": {"seed": 2}}]
    layout = (stages, stages, 2, 16)
    free = generate(texts.directory, records, layout, max_new_tokens=30, temperature=temperature)
    for record, output in zip(records, free, strict=True):
        text = output["text"]
        assert len(text) > 20
        stop = text[9:12]
        own = {**record["generate"], "stop": ["never", stop]}
        [ended] = generate(
            texts.directory, [{**record, "generate": own}], layout, max_new_tokens=30, temperature=temperature
        )
        assert ended["text"] == text[: text.index(stop)]
        assert ended["finish_reason"] == "stop"
        tokens = ended["token_ids"]
        assert tokens == output["token_ids"][: len(tokens)]
        assert stop in texts.tokenizer.decode(tokens)
        assert stop not in texts.tokenizer.decode(tokens[:-1])


def test_the_first_of_several_stop_strings_ends_the_text(texts):
    [free] = generate(texts.directory, [{"prompt": "abc de"}], max_new_tokens=30)
    text = free["text"]
    stops = [text[12:14], text[6:10], "zzz"]
    [ended] = generate(texts.directory, [{"prompt": "abc de"}], max_new_tokens=30, stop=stops)
    assert ended["text"] == text[: min(text.index(stop) for stop in stops[:2])]


def test_a_token_that_completes_two_stop_strings_is_cut_before_the_first(texts):
    stop = Text(texts.directory, 128).stop_at(("cd", "bc"))
    assert stop.cut("abcd") == "a"


def test_a_stop_string_that_never_comes_changes_nothing(texts):
    records = [{"prompt": "abc de"}, {"prompt": "gh fab"}]
    free = generate(texts.directory, records, max_new_tokens=30)
    assert generate(texts.directory, records, max_new_tokens=30, stop="never") == free


def test_the_texts_of_tokens_add_up_to_the_text(texts):
    [output] = generate(texts.directory, [{"prompt": "abc de"}], max_new_tokens=30, logprobs=1)
    assert "".join(each["text"] for each in output["logprobs"]).removesuffix("</s>") == output["text"]


# -- score


def scored(model, prompt, targets):
    """What the score of a continuation has to be."""
    expected = logprobs_of(model, prompt + targets)[len(prompt) - 1 : -1]
    logprobs = expected.gather(1, torch.tensor(targets)[:, None])[:, 0].tolist()
    return {
        "logprob": pytest.approx(sum(logprobs), **TOLERANCE),
        "token_logprobs": pytest.approx(logprobs, **TOLERANCE),
        "token_ids": targets,
        "is_greedy": expected.argmax(1).tolist() == targets,
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scores_equal_transformers(tiny_llama, layout):
    directory, model = tiny_llama
    records = []
    for ids in prompts():
        best = reference(model, ids, max_new_tokens=5)
        records.append({"token_ids": ids, "continuations": [[7], best, [*best[:-1], 9], best[:1]]})
    made = compute(directory, "score", records, layout, kv_tokens=2 * LENGTH)
    for record, output in zip(records, made.outputs, strict=True):
        prompt = record["token_ids"]
        assert output["scores"] == [scored(model, prompt, targets) for targets in record["continuations"]]
        assert [score["is_greedy"] for score in output["scores"]][1:] == [True, False, True]
        assert output["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize(
    ("prompt", "continuations"),
    [("abc de", [" fgh ab", " b", "  g"]), ("abc de ", ["fgh", "b gg", " h"]), (" ab \n ", ["fgh ab", "ab"])],
)
@pytest.mark.parametrize("fixture", ["texts", "texts_with_beginning"])
def test_prompt_and_continuation_are_tokenized_together(request, fixture, prompt, continuations):
    """Blanks at the prompt's end belong to the continuation, whose first word has its blank in its token."""
    texts = request.getfixturevalue(fixture)
    made = compute(texts.directory, "score", [{"prompt": prompt, "continuations": continuations}])
    for continuation, score in zip(continuations, made.outputs[0]["scores"], strict=True):
        own = texts.tokenizer(prompt.rstrip()).input_ids
        assert own + score["token_ids"] == texts.tokenizer(prompt + continuation).input_ids
        assert score == scored(texts.model, own, score["token_ids"])
    assert made.outputs[0]["prompt_tokens"] == len(own)


@pytest.mark.parametrize("prompt", ["", " "])
@pytest.mark.parametrize("fixture", ["texts", "texts_with_beginning"])
def test_what_has_no_prompt_is_scored_behind_the_token_that_begins_texts(request, fixture, prompt):
    texts = request.getfixturevalue(fixture)
    made = compute(texts.directory, "score", [{"prompt": prompt, "continuations": ["fgh ab"]}])
    targets = texts.tokenizer(prompt + "fgh ab", add_special_tokens=False).input_ids
    assert made.outputs[0]["scores"] == [scored(texts.model, [1], targets)]


def test_token_ids_without_a_prompt_are_scored_behind_the_token_that_begins_texts(texts):
    made = compute(texts.directory, "score", [{"token_ids": [], "continuations": [[9, 8]]}])
    assert made.outputs[0]["scores"] == [scored(texts.model, [1], [9, 8])]


# -- embed


@torch.inference_mode()
def pooled(model, ids, pooling, normalize):
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
    vector = hidden.mean(0) if pooling == "mean" else hidden[-1]
    return pytest.approx((vector / vector.norm() if normalize else vector).tolist(), **TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_equal_transformers(tiny_llama, pooling, normalize, layout):
    directory, model = tiny_llama
    options = {"pooling": pooling, "normalize": normalize}
    made = compute(directory, "embed", records_of(prompts()), layout, embed=options)
    for ids, output in zip(prompts(), made.outputs, strict=True):
        assert output == {"embedding": pooled(model, ids, pooling, normalize), "prompt_tokens": len(ids)}


def test_hidden_states_are_kept_though_their_memory_is_used_again(tiny_llama):
    """What is received from another rank lies in a buffer that the next message overwrites."""
    task, _ = prepare(tiny_llama[0], "embed", [])
    received = torch.ones(3, 4)
    kept = task.results(received, [], [])
    received.zero_()
    assert all(state.tolist() == [1.0] * 4 for state in kept)


def test_a_record_may_hold_several_texts_to_embed(tiny_llama):
    directory, model = tiny_llama
    made = compute(directory, "embed", [{"inputs": records_of(prompts())}, {"inputs": records_of(prompts()[:1])}])
    many, one = made.outputs
    assert many["embeddings"] == [pooled(model, ids, "mean", True) for ids in prompts()]
    assert many["prompt_tokens"] == sum(map(len, prompts()))
    assert one["embedding"] == pooled(model, prompts()[0], "mean", True)


def test_no_part_holds_an_output_embedding_when_vectors_are_wanted(tiny_mistral):
    directory, model = tiny_mistral
    own = sum(part.weight_bytes for part in load_parts(directory, 2, False))
    whole = sum(p.nbytes for p in model.parameters())
    assert own == whole - model.lm_head.weight.nbytes


# -- records that cannot be computed


@pytest.mark.parametrize(
    ("task", "longest", "too_long"),
    [
        ("generate", {"token_ids": [5] * 63}, {"token_ids": [5] * 64}),
        (
            "score",
            {"token_ids": [5] * 60, "continuations": [[5] * 5]},
            {"token_ids": [5] * 60, "continuations": [[5] * 6]},
        ),
        ("embed", {"token_ids": [5] * 64}, {"token_ids": [5] * 65}),
    ],
)
def test_what_is_too_long_is_refused(tiny_llama, task, longest, too_long):
    directory, _ = tiny_llama
    assert len(compute(directory, task, [longest]).outputs) == 1
    message = refusal(directory, task, too_long)
    most = 63 if task == "generate" else 64
    assert f"has {most + 1} tokens, but {most} is the most" in message
    assert "shorten" in message


@pytest.mark.parametrize(
    ("task", "record", "words"),
    [
        ("generate", {"token_ids": []}, "prompt: is empty; give"),
        ("generate", {"token_ids": [128]}, "128 is outside the model's vocabulary of 128; use"),
        ("generate", {"prompt": "a"}, "has no tokenizer; give token_ids"),
        ("generate", {"token_ids": [1], "generate": {"stop": "a"}}, "stop: 'a' cannot be found without a tokenizer"),
        ("score", {"token_ids": [1], "continuations": [[2], []]}, "continuations: number 1 is empty; give"),
        ("score", {"token_ids": [1], "continuations": [[128]]}, "128 is outside the model's vocabulary of 128; use"),
        ("score", {"prompt": "a", "continuations": ["b"]}, "has no tokenizer; give token_ids"),
        ("embed", {"token_ids": []}, "prompt: is empty; give"),
        ("embed", {"inputs": [{"token_ids": [1]}, {"token_ids": []}]}, "prompt: is empty; give"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_a_reason(tiny_llama, task, record, words):
    directory, _ = tiny_llama
    assert words in refusal(directory, task, record)


def test_an_empty_text_continues_nothing(texts):
    assert "number 0 is empty" in refusal(texts.directory, "score", {"prompt": "ab", "continuations": [""]})


def test_stop_strings_of_the_job_need_a_tokenizer(tiny_llama):
    directory, _ = tiny_llama
    message = refusal(directory, "generate", {"token_ids": [1]}, generate={"stop": ["a"]})
    assert "stop: 'a' cannot be found without a tokenizer" in message
    assert "give stop_token_ids or add tokenizer.json" in message
