"""The example jobs: factories, data, and the single-process references that runs are held against."""

import os

import numpy as np
import pytest
import torch
from stories import (
    DECODER_JOBS,
    REPO,
    STORIES,
    load_image,
    load_job,
    load_module,
    missing,
    named,
    reference,
    small_story,
)

from jobs import make_fields, make_program, speaker, unet
from mpinfer.errors import RecordError
from mpinfer.spec import load_spec

IMAGES = ["astronaut.jpg", "chelsea.jpg", "coffee.jpg", "rocket.jpg"]
VOICES = ["female_rain.wav", "female_results.wav", "male_rain.wav", "male_results.wav"]
MARGIN = 0.01  # between logits


def fetched(story):
    """The job of a story whose model is there. MPINFER_STORIES=1 makes a model that is not there a failure."""
    if absent := missing(story):
        message = f"{', '.join(absent)} not there: do what jobs/{story}.yaml says"
        if os.environ.get("MPINFER_STORIES") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return load_job(story)


def test_every_job_is_run_by_a_test():
    assert {path.stem for path in (REPO / "jobs").glob("*.yaml")} == {*STORIES, *DECODER_JOBS}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Reference of a small story."""

    def make(story):
        return small_story(story, tmp_path_factory.mktemp(story))[1]

    return make


@pytest.mark.parametrize("story", STORIES)
def test_job_files_are_valid(story):
    assert load_spec(REPO / "jobs" / f"{story}.yaml").model.task == story.partition("_")[0]


@pytest.mark.parametrize("story", ["classify_images", "embed_speech"])
def test_fetched_weights_load_strictly(story):
    assert sum(p.numel() for p in load_module(fetched(story)).parameters()) > 10**6


def test_the_classifier_sees_what_is_there():
    fetched("classify_images")
    results = reference("classify_images")
    assert "cat" in results["chelsea.jpg"]["label"]
    assert results["coffee.jpg"]["label"] in ("espresso", "cup")


def test_sentences_of_like_meaning_are_close():
    fetched("embed_sentences")
    vectors = {name: result["embedding"] for name, result in reference("embed_sentences").items()}
    for one, like in [("cat", "kitten"), ("bread", "loaf"), ("train", "timetable"), ("telescope", "stars")]:
        others = [name for name in vectors if name not in (one, like)]
        assert vectors[one] @ vectors[like] > max(vectors[one] @ vectors[name] for name in others)


def test_recordings_of_one_voice_are_close():
    fetched("embed_speech")
    vectors = [result["embedding"] for result in reference("embed_speech").values()]
    alike = np.stack(vectors) @ np.stack(vectors).T
    assert min(alike[0, 1], alike[2, 3]) > 0.75
    assert alike[:2, 2:].max() < 0.6


def test_small_classification_tells_images_apart(small):
    results = small("classify_images")
    assert list(results) == IMAGES
    assert len({result["label"] for result in results.values()}) == 4
    for result in results.values():
        scores = [score for _, score in result["top"]]
        assert (result["label"], result["score"]) == tuple(result["top"][0])
        assert len(scores) == 5
        assert scores == sorted(scores, reverse=True)
        # No two so close that rounding could swap them.
        assert min(np.diff(-np.log(scores))) > MARGIN


def test_small_embeddings_have_length_1(small):
    for story, records, width in [("embed_sentences", 24, 48), ("embed_speech", 4, 256)]:
        vectors = np.stack([result["embedding"] for result in small(story).values()])
        assert vectors.shape == (records, width)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
        assert (vectors @ vectors.T - 2 * np.eye(records)).max() < 0.99  # a wrong order would be seen


def test_small_unet_gives_two_fields(small):
    results = small("forward_unet")
    assert list(results) == list(range(6))
    assert {result["output"].shape for result in results.values()} == {(2, 64, 64)}


def test_small_program_gives_features_and_scores(small):
    results = small("forward_program")
    assert list(results) == list(range(6))
    assert {result["features"].shape for result in results.values()} == {(96,)}
    assert {result["scores"].shape for result in results.values()} == {(10,)}


def test_the_program_takes_batches_of_any_size(tmp_path):
    program = torch.export.load(make_program.write_program(tmp_path)).module()
    module = make_program.build().eval()
    fields = torch.from_numpy(make_fields.make_fields(5))
    for batch in (1, 2, 5):
        with torch.no_grad():
            outputs, expected = program(fields[:batch]), module(fields[:batch])
        for name, tensor in expected.items():
            torch.testing.assert_close(outputs[name], tensor)


def test_images_are_resized_cropped_and_scaled():
    rules = load_job("classify_images")["images"]
    image = load_image(REPO / "jobs/data/images/chelsea.jpg", rules)
    assert image.shape == (3, 224, 224)
    assert -127 / 128 <= image.min() < image.max() <= 1


def test_classifier_halves_images_five_times():
    model = named("jobs.efficientnet:build")().eval()
    sides = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: sides.append(output.shape[-1]))
        for module in (model._conv_stem, *model._blocks)
    ]
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert sides == [112] * 2 + [56] * 2 + [28] * 2 + [14] * 6 + [7] * 5
    assert len(hooks) == len(sides)


def test_unet_is_the_same_each_time_and_leaves_the_seed_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one, other = unet.build().state_dict(), unet.build().state_dict()
    assert torch.rand(1) == expected
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert 1.5e6 < sum(tensor.numel() for tensor in one.values()) < 2.5e6


def test_fields_are_the_same_each_time_and_differ():
    fields = make_fields.make_fields(3)
    assert fields.shape == (3, 1, 64, 64)
    assert fields.dtype == np.float32
    assert np.array_equal(fields[:2], make_fields.make_fields(2))
    assert not np.array_equal(fields[0], fields[1])


def test_speech_becomes_a_mel_spectrogram():
    for name in VOICES:
        (mels,) = speaker.prepare({"audio": str(REPO / "jobs/data/speech" / name)}).values()
        assert mels.shape == (160, 40)
        assert mels.dtype == torch.float32


def test_a_tone_is_heard_in_its_mel_channel(tmp_path):
    import soundfile

    path = tmp_path / "tone.wav"
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 1000 * np.arange(32000) / 16000), 16000)
    (mels,) = speaker.prepare({"audio": str(path)}).values()
    # Slaney's scale is linear up to 1000 Hz, which is mel 15 of the 45.245 that 8000 Hz are; 41 steps hold 40 channels.
    assert set(mels[10:150].argmax(dim=1).tolist()) == {round(15 / 45.245 * 41) - 1}


def test_silence_and_stereo_are_heard_as_they_are(tmp_path):
    import soundfile

    noise = np.random.default_rng(0).normal(0, 0.1, 32000)
    for name, samples in [("mono", noise), ("stereo", np.stack([2 * noise, 0 * noise], axis=1)), ("none", 0 * noise)]:
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000, subtype="FLOAT")
    mono, stereo, none = (
        speaker.prepare({"audio": str(tmp_path / f"{name}.wav")})["mels"] for name in ("mono", "stereo", "none")
    )
    torch.testing.assert_close(mono, stereo)
    assert none.max() <= 1e-9


@pytest.mark.parametrize(
    ("rate", "seconds", "message"),
    [(16000, 1.5, "lasts 1.5 s, the model hears 1.6 s"), (44100, 2, "44100 samples a second, the model hears 16000")],
)
def test_recordings_that_the_model_cannot_hear_are_refused(tmp_path, rate, seconds, message):
    import soundfile

    path = tmp_path / "short.wav"
    soundfile.write(path, np.zeros(int(rate * seconds)), rate)
    with pytest.raises(RecordError, match=message):
        speaker.prepare({"audio": str(path)})


def test_a_file_without_sound_is_refused(tmp_path):
    path = tmp_path / "text.wav"
    path.write_text("no sound")
    with pytest.raises(RecordError, match="cannot be read as audio"):
        speaker.prepare({"audio": str(path)})
