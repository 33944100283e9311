"""From records' fields to tensors: held against plain computations, and against transformers where it prepares."""

import io
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mpinfer.errors import ModelError, RecordError, SpecError
from mpinfer.forward.prepare import make_preparer
from mpinfer.forward.prepare_audio import resample
from mpinfer.spec import spec_from_dict

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "one", "two", "three"]
PLAIN = {"mean": [0.0], "std": [1.0], "interpolation": "nearest"}  # gray, from 0 to 1


def spec(path="package.module:factory", model=(), **sections):
    model = {"path": str(path), "task": "forward", **dict(model)}
    return spec_from_dict({"model": model, "input": {"path": "r.jsonl"}, **sections})


def preparer_of(path="package.module:factory", kind="auto", **sections):
    return make_preparer(spec(path, **sections), kind)


def refusal(preparer, fields):
    with pytest.raises(RecordError) as caught:
        preparer.sample(fields)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


# -- text


@pytest.fixture
def text_model(tmp_path):
    """Make a directory with a tokenizer of `WORDS`, [CLS] and [SEP] around a text."""

    def make(config=None, **tokenizer):
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        core.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
        names = ["input_ids", "token_type_ids", "attention_mask"]
        options = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_input_names": names, **tokenizer}
        PreTrainedTokenizerFast(tokenizer_object=core, **options).save_pretrained(tmp_path)
        config = {"model_type": "bert", "max_position_embeddings": 8, **(config or {})}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return tmp_path

    return make


def test_text_becomes_tokens_and_batches_are_padded_to_their_longest(text_model):
    preparer = preparer_of(text_model())
    samples = [preparer.sample({"text": text, "label": "unused"}) for text in ("one two", "three")]
    assert samples[0]["input_ids"].tolist() == [1, 4, 5, 2]
    assert preparer.longest == {"input_ids": 8, "token_type_ids": 8, "attention_mask": 8}
    assert [preparer.size(sample) for sample in samples] == [4, 3]
    assert preparer.key(samples[0]) == preparer.key(samples[1]) == ()
    batch = preparer.collate(samples)
    assert batch["input_ids"].tolist() == [[1, 4, 5, 2], [1, 6, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch["input_ids"].dtype == torch.int64


def test_pairs_of_texts_are_told_apart_and_prompt_is_a_text_too(text_model):
    sample = preparer_of(text_model()).sample({"prompt": "one", "text_pair": "two"})
    assert sample["input_ids"].tolist() == [1, 4, 2, 5, 2]
    assert sample["token_type_ids"].tolist() == [0, 0, 0, 1, 1]


def test_padding_is_the_tokenizers_own(text_model):
    preparer = preparer_of(text_model(pad_token="[UNK]", model_input_names=["input_ids", "attention_mask"]))
    batch = preparer.collate([preparer.sample({"text": text}) for text in ("one two", "one")])
    assert {name: rows[1].tolist() for name, rows in batch.items()} == {
        "input_ids": [1, 4, 2, 3],
        "attention_mask": [1, 1, 1, 0],
    }


def test_a_batch_has_two_tokens_at_least(text_model):
    directory = text_model()
    file = directory / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree["post_processor"] = None
    file.write_text(json.dumps(tree), encoding="utf-8")
    preparer = preparer_of(directory)
    batch = preparer.collate([preparer.sample({"text": "one"})])
    assert (batch["input_ids"].tolist(), batch["attention_mask"].tolist()) == ([[4, 0]], [[1, 0]])
    assert "0 tokens" in refusal(preparer, {"text": ""})


def test_without_a_mask_only_texts_of_one_length_share_a_batch(text_model):
    preparer = preparer_of(text_model(model_input_names=["input_ids"]))
    keys = [preparer.key(preparer.sample({"text": text})) for text in ("one", "two", "one two")]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("config", "options", "limit"),
    [
        ({}, {}, 8),
        ({}, {"model_max_length": 6}, 6),
        ({}, {"model_max_length": 10**30}, 8),
        ({"model_type": "roberta", "pad_token_id": 1}, {}, 6),  # positions from 2 on
        ({"model_type": "t5", "max_position_embeddings": None}, {"model_max_length": 5}, 5),  # without positions
    ],
)
def test_text_of_more_tokens_than_the_model_takes_is_refused(text_model, config, options, limit):
    preparer = preparer_of(text_model(config, **options))
    assert set(preparer.longest.values()) == {limit}
    assert preparer.size(preparer.sample({"text": "one " * (limit - 2)})) == limit
    message = refusal(preparer, {"text": "one " * (limit - 1)})
    assert f"has {limit + 1} tokens" in message
    assert f"takes {limit} at most" in message


def test_sentence_transformers_cut_a_text_off(text_model):
    directory = text_model()
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    preparer = preparer_of(directory)
    assert preparer.sample({"text": "one two three one"})["input_ids"].tolist() == [1, 4, 5, 2]
    assert preparer.longest["input_ids"] == 4
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 100}')
    assert preparer_of(directory).longest["input_ids"] == 8
    (directory / "sentence_bert_config.json").write_text("[]")
    with pytest.raises(ModelError, match="sentence_bert_config"):
        preparer_of(directory)


def test_text_that_is_none_is_refused(text_model):
    preparer = preparer_of(text_model())
    assert "text: is missing" in refusal(preparer, {"image": "a.png"})
    assert "text: is int" in refusal(preparer, {"text": 5})
    assert "text_pair: is list" in refusal(preparer, {"text": "one", "text_pair": []})
    assert "text:" in refusal(preparer, {"text": "\ud800"})
    assert preparer.size(preparer.sample({"text": ""})) == 2


@pytest.mark.parametrize(
    ("config", "options", "match"),
    [
        ({}, {"pad_token": None}, "pad_token"),
        ({"model_type": "t5", "max_position_embeddings": None}, {}, "model_max_length"),
        ({"model_type": "no-such-model"}, {}, "AutoConfig"),
    ],
)
def test_tokenizers_that_cannot_be_used_are_refused_at_once(text_model, config, options, match):
    directory = text_model(config, **options)
    with pytest.raises(ModelError, match=match) as caught:
        preparer_of(directory)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


# -- images


def save_image(array, format="PNG", **options):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8)).save(file, format, **options)
    return file.getvalue()


def plain(resize, crop, **options):
    return preparer_of(images={"resize": resize, "crop": crop, **PLAIN, **options})


GRAY = np.arange(0, 240, 10).reshape(4, 6)
MIDDLE = (np.float32(GRAY[:, 1:5]) / np.float32(255)).tolist()  # the centred square


def test_images_are_cropped_in_the_middle_and_normalized(tmp_path):
    (tmp_path / "a.png").write_bytes(save_image(GRAY))
    preparer = plain(4, 4)
    sample = preparer.sample({"image": str(tmp_path / "a.png")})
    assert list(sample) == ["input"]
    assert (sample["input"].dtype, sample["input"].tolist()) == (torch.float32, [MIDDLE])
    colors = np.stack([GRAY, GRAY + 1, GRAY + 2], axis=-1)
    mean, std = np.float32([0.1, 0.2, 0.3]), np.float32([0.5, 1, 2])
    expected = ((np.float32(colors[:, 1:5]) / np.float32(255) - mean) / std).transpose(2, 0, 1)
    sample = plain(4, 4, mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0]).sample({"image": colors})
    assert sample["input"].tolist() == expected.tolist()


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (16, 16)])
def test_the_shorter_side_is_resized(shape):
    from PIL import Image

    array = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    sample = preparer_of(images={"resize": 10, "crop": 8, "interpolation": "bicubic"}).sample({"image": array})
    height, width = (10 * side // min(shape) for side in shape)
    resized = np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - 8) / 2), round((width - 8) / 2)
    values = sample["input"].numpy().transpose(1, 2, 0) * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]
    assert (values * 255).round().tolist() == resized[top : top + 8, left : left + 8].tolist()


def test_an_image_may_come_in_many_ways(tmp_path):
    from PIL import Image

    data = save_image(GRAY)
    (tmp_path / "a.png").write_bytes(data)
    ways = [
        tmp_path / "a.png",
        data,
        bytearray(data),
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        Image.open(io.BytesIO(data)),
        GRAY.tolist(),
        GRAY[..., None],
        np.stack([GRAY] * 3),  # [channels, height, width]
        np.dstack([GRAY] * 3 + [GRAY * 0]),  # transparent
    ]
    preparer = plain(4, 4)
    assert [preparer.sample({"image": way})["input"].tolist() for way in ways] == [[MIDDLE]] * len(ways)


def test_images_stand_upright_and_16_bits_keep_their_shades():
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = save_image(GRAY[::-1, ::-1], exif=exif)
    assert plain(4, 4).sample({"image": turned})["input"].tolist() == [MIDDLE]
    file = io.BytesIO()
    Image.fromarray((GRAY * 257).astype(np.uint16)).save(file, "PNG")
    assert plain(4, 4).sample({"image": file.getvalue()})["input"].tolist() == [MIDDLE]


def test_images_that_cannot_be_read_are_refused_by_name(tmp_path, monkeypatch):
    from PIL import Image

    preparer = plain(4, 4)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    (tmp_path / "cut.png").write_bytes(save_image(noise)[:2000])
    (tmp_path / "cut.jpg").write_bytes(save_image(noise, "JPEG")[:2000])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.png", "cut.jpg", "text.png", "empty.png", "missing.png", "."):
        assert str(tmp_path / name) in refusal(preparer, {"image": str(tmp_path / name)})
    assert "image: is missing" in refusal(plain(4, 4), {"image": None})
    assert "neither" in refusal(preparer, {"image": {"path": None}})
    assert "0 to 255" in refusal(preparer, {"image": [[0.5]]})
    assert "[2, 3, 5, 7]" in refusal(preparer, {"image": np.zeros((2, 3, 5, 7), int)})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "bomb.png").write_bytes(save_image(np.zeros((20, 20))))
    assert "bomb.png" in refusal(preparer, {"image": str(tmp_path / "bomb.png")})
    assert "too long and thin" in refusal(preparer, {"image": np.zeros((1, 90), int)})


@pytest.mark.parametrize(
    ("images", "match"),
    [
        ({"resize": 8, "crop": 9}, "images.crop=9"),
        ({"mean": [0.5]}, "images.std="),
        ({"mean": [0.5, 0.5], "std": [1.0, 1.0]}, "images.mean="),
        ({"std": [0.2, 0.0, 0.2]}, "images.std="),
    ],
)
def test_settings_of_images_that_contradict_each_other_are_refused(images, match):
    with pytest.raises(SpecError, match=match):
        preparer_of(kind="images", images=images)


def save_config(directory, model_type, preprocessor, name="preprocessor_config.json"):
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    (directory / name).write_text(json.dumps(preprocessor))
    return directory


VIT = {"size": {"height": 6, "width": 5}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


@pytest.mark.parametrize(
    "preprocessor", [{"image_processor_type": "ViTImageProcessor"}, {"feature_extractor_type": "ViTFeatureExtractor"}]
)
def test_images_of_a_directory_are_prepared_by_its_own_processor(tmp_path, preprocessor):
    preparer = preparer_of(save_config(tmp_path, "vit", {**preprocessor, **VIT}))
    sample = preparer.sample({"image": save_image(np.full((9, 7), 255))})  # gray: made RGB first
    assert {name: tensor.shape for name, tensor in sample.items()} == {"pixel_values": (3, 6, 5)}
    assert sample["pixel_values"].unique().tolist() == pytest.approx([2.0])
    assert preparer.longest == {}
    assert preparer.collate([sample, sample])["pixel_values"].shape == (2, 3, 6, 5)


def test_processors_that_are_part_of_a_processor_count_and_images_come_before_text(tmp_path):
    nested = {"image_processor": {"image_processor_type": "ViTImageProcessor", **VIT}, "processor_class": "X"}
    save_config(tmp_path, "vit", nested, "processor_config.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    sample = preparer_of(tmp_path).sample({"image": np.zeros((9, 7, 3), np.uint8)})
    assert sample["pixel_values"].shape == (3, 6, 5)


@pytest.mark.parametrize("preprocessor", [{"image_processor_type": "NoSuchProcessor"}, []])
def test_processors_that_cannot_be_loaded_are_refused_at_once(tmp_path, preprocessor):
    save_config(tmp_path, "bert", {"first": 1} if preprocessor else preprocessor)
    if preprocessor:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    with pytest.raises(ModelError) as caught:
        preparer_of(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_processor_takes_images_as_the_job_says(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    preparer = preparer_of(tmp_path, images={"resize": 4, "crop": 4, **PLAIN})
    assert preparer.sample({"image": GRAY})["pixel_values"].tolist() == [MIDDLE]


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ModelError, match=r"mpinfer\[images\]"):
        preparer_of(kind="images")
    with pytest.raises(ModelError, match=r"mpinfer\[audio\]"):
        preparer_of(kind="audio").sample({"audio": b""})


# -- audio


def wave(seconds, rate, hz=440.0):
    return np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate).astype(np.float32) / 2


def save_audio(samples, rate, format="WAV", **options):
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, **{"subtype": "FLOAT", **options})
    return file.getvalue()


def test_audio_is_the_mean_of_its_channels(tmp_path):
    left, right = wave(0.1, 16000), wave(0.1, 16000, 1000.0)
    data = save_audio(np.stack([left, right], axis=1), 16000)
    (tmp_path / "a.wav").write_bytes(data)
    preparer = preparer_of()
    for way in (data, str(tmp_path / "a.wav"), {"bytes": data, "path": "a.wav"}, ((left + right) / 2).tolist()):
        sample = preparer.sample({"audio": way})
        assert list(sample) == ["input"]
        assert sample["input"].tolist() == pytest.approx(((left + right) / 2).tolist(), abs=1e-6)
        assert sample["input"].dtype == torch.float32
    same, longer = preparer.sample({"audio": data}), preparer.sample({"audio": [*left.tolist(), 0.0]})
    assert preparer.key(sample) == preparer.key(same) != preparer.key(longer)


def test_audio_has_the_rate_that_the_job_says():
    data = save_audio(wave(0.5, 44100), 44100, "FLAC", subtype="PCM_16")
    expected = {16000: wave(0.5, 16000), 8000: wave(0.5, 8000)}
    for rate, samples in expected.items():
        given = preparer_of(audio={"sample_rate": rate}).sample({"audio": data})["input"].numpy()
        assert len(given) == len(samples)
        assert abs(given - samples)[300:-300].max() < 2e-4
    array = {"audio": (wave(0.5, 8000) * 2**15).astype(np.int16), "sample_rate": 8000}
    given = preparer_of().sample(array)["input"].numpy()
    assert abs(given - expected[16000])[300:-300].max() < 2e-4


@pytest.mark.parametrize(
    ("rate", "target"), [(44100, 16000), (8000, 16000), (48000, 16000), (11025, 8000), (999, 1000)]
)
def test_resampling_keeps_what_both_rates_can_hold(rate, target):
    limit = min(rate, target) / 2
    seconds = 4000 / limit
    kept = resample(wave(seconds, rate, 0.8 * limit), rate, target)
    assert len(kept) == math.ceil(int(seconds * rate) * target / rate)
    inner = slice(len(kept) // 4, -len(kept) // 4)
    difference = kept - wave(seconds + 1, target, 0.8 * limit)[: len(kept)]
    assert abs(difference[inner]).max() < 1e-3
    if rate > target:
        removed = resample(wave(seconds, rate, 1.1 * limit), rate, target)
        assert abs(removed[inner]).max() < 1e-3


def test_resampling_of_few_samples_is_that_of_silence_around_them():
    few = np.float32([1, -1, 0.5])
    padded = np.pad(few, (441, 441))
    assert resample(few, 44100, 16000).tolist() == pytest.approx(
        resample(padded, 44100, 16000)[160:162].tolist(), abs=1e-6
    )
    assert len(resample(few, 2**32 - 1, 16000)) == 1


def test_audio_that_is_too_long_empty_or_damaged_is_refused_by_name(tmp_path):
    preparer = preparer_of(audio={"max_seconds": 0.5})
    assert preparer.sample({"audio": save_audio(wave(0.5, 11025), 11025)})["input"].shape == (8000,)
    (tmp_path / "long.wav").write_bytes(save_audio(wave(0.75, 8000), 8000))
    assert "0.75 s" in refusal(preparer, {"audio": str(tmp_path / "long.wav")})
    (tmp_path / "none.wav").write_bytes(save_audio(np.zeros(0, np.float32), 8000))
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "empty.wav").write_bytes(b"")
    for name in ("long.wav", "none.wav", "text.wav", "empty.wav", "missing.wav", "."):
        assert str(tmp_path / name) in refusal(preparer, {"audio": str(tmp_path / name)})
    assert "0.75 s" in refusal(preparer, {"audio": [0.0] * 12000})
    assert "[2, 3]" in refusal(preparer, {"audio": [[0.0] * 3] * 2})
    assert "empty" in refusal(preparer, {"audio": []})
    assert "sample_rate: is 0" in refusal(preparer, {"audio": [0.0], "sample_rate": 0})
    assert "audio: is missing" in refusal(preparer, {"audio": None})


def test_the_longest_audio_is_known_of_a_job_of_audio():
    assert preparer_of(kind="audio", audio={"max_seconds": 2.5}).longest == {"input": 40000}
    assert preparer_of().longest == {}


def test_audio_of_a_directory_is_prepared_by_its_own_extractor(tmp_path):
    extractor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 8000}
    preparer = preparer_of(save_config(tmp_path, "wav2vec2", extractor), audio={"max_seconds": 0.25})
    samples = wave(0.2, 8000) + np.float32(0.25)
    (values,) = preparer.sample({"audio": save_audio(samples, 8000)}).values()
    expected = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
    assert values.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert preparer.longest == {"input_values": 2000}
    with pytest.raises(SpecError, match=r"audio.sample_rate=16000: the model takes 8000"):
        preparer_of(tmp_path, audio={"sample_rate": 16000})


def test_extractors_of_a_fixed_length_vary_in_nothing_and_cut_nothing_off(tmp_path):
    sizes = {"chunk_length": 1, "feature_size": 8, "sampling_rate": 16000}
    extractor = {"feature_extractor_type": "WhisperFeatureExtractor", **sizes}
    preparer = preparer_of(save_config(tmp_path, "whisper", extractor))
    assert preparer.longest == {}
    assert preparer.sample({"audio": wave(0.3, 16000)})["input_features"].shape == (8, 100)
    assert "allow 1 s" in refusal(preparer, {"audio": wave(1.5, 16000)})


# -- arrays and functions


def test_fields_are_inputs_of_their_names():
    preparer = preparer_of()
    fields = {
        "a": [[1, 2], [3, 4]],
        "b": np.array([1.5, 2.5], ">f8")[::-1],
        "c": True,
        "d": 3,
        "e": 0.5,
        "f": torch.tensor([1, 2], dtype=torch.int32),
        "g": np.frombuffer(b"\1\2", np.uint8),
    }
    sample = preparer.sample(fields)
    assert {name: (tensor.tolist(), tensor.dtype) for name, tensor in sample.items()} == {
        "a": ([[1, 2], [3, 4]], torch.int64),
        "b": ([2.5, 1.5], torch.float32),
        "c": (True, torch.bool),
        "d": (3, torch.int64),
        "e": (0.5, torch.float32),
        "f": ([1, 2], torch.int32),
        "g": ([1, 2], torch.uint8),
    }
    batch = preparer.collate([sample, sample])
    assert (batch["a"].shape, batch["d"].tolist()) == ((2, 2, 2), [3, 3])
    assert (preparer.longest, preparer.size(sample)) == ({}, 0)
    assert preparer.sample({"x": [math.nan, math.inf]})["x"].isnan().tolist() == [True, False]


def test_samples_share_a_batch_when_names_shapes_and_types_agree():
    preparer = preparer_of()
    fields = [{"a": [1.0], "b": 2}, {"b": 3, "a": [4.0]}, {"a": [1], "b": 2}, {"a": [1.0, 2.0], "b": 2}, {"a": [1.0]}]
    keys = [preparer.key(preparer.sample(each)) for each in fields]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"x": "words"}, "x: is str, and the model has no tokenizer"),
        ({"x": ["a"]}, "x: has a value that is not a number (str)"),
        ({"x": None}, "x: has a value that is not a number (NoneType)"),
        ({"x": [1, [None]]}, "x: its lists differ in length"),
        ({"x": [[1, 2], [3]]}, "x: its lists differ in length"),
        ({"x": [1, None]}, "(NoneType)"),
        ({"x": {"y": 1}}, "(dict)"),
        ({"x": [2**70]}, "more than 64 bits"),
        ({"x": np.array([1, "a"], object)}, "(object)"),
        ({"x": []}, "x: is empty (shape [0])"),
        ({}, "no fields"),
    ],
)
def test_fields_that_are_no_numbers_are_refused(fields, message):
    assert message in refusal(preparer_of(), fields)


@pytest.fixture
def functions(monkeypatch):
    """Put functions into a module `own`."""

    def put(**found):
        monkeypatch.setitem(sys.modules, "own", SimpleNamespace(**found))

    return put


def test_a_function_of_the_user_prepares(functions, text_model):
    weight = torch.ones(2, requires_grad=True)
    functions(
        several=lambda fields: {"x": fields["a"] * weight, "y": np.array([fields["a"]])},
        one=lambda fields: np.array([fields["a"]]),
    )
    model = {"prepare": "own:several"}
    sample = preparer_of(text_model(), model=model).sample({"a": 0.5})  # before the directory's own
    assert {name: (tensor.tolist(), tensor.dtype) for name, tensor in sample.items()} == {
        "x": ([0.5, 0.5], torch.float32),
        "y": ([0.5], torch.float32),
    }
    assert not sample["x"].requires_grad
    assert preparer_of(model={"prepare": "own:one"}).sample({"a": 2})["input"].tolist() == [2]


def test_what_a_function_raises_or_gives_wrongly_is_an_error_of_its_record(functions):
    def refuses(fields):
        raise RecordError("a reason of its own")

    functions(
        refuses=refuses,
        fails=lambda fields: fields["absent"],
        empty=lambda fields: {},
        numbered=lambda fields: {1: 2},
        nothing=lambda fields: None,
        words=lambda fields: {"x": "words"},
    )
    messages = {
        "refuses": "a reason of its own",
        "fails": "model.prepare=own:fails: raised KeyError: 'absent'",
        "empty": "model.prepare=own:empty: gave {}",
        "numbered": "model.prepare=own:numbered: gave {1: 2}",
        "nothing": "input: has a value that is not a number (NoneType)",
        "words": "x: has a value that is not a number (str)",
    }
    for name, message in messages.items():
        assert message in refusal(preparer_of(model={"prepare": f"own:{name}"}), {})


def test_what_cannot_be_called_is_no_function(functions):
    functions(number=3)
    with pytest.raises(ModelError, match=r"model\.prepare=own:number: is a int"):
        preparer_of(model={"prepare": "own:number"})
