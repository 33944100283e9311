"""What the jobs of `jobs/` should give: computed by plain torch in one process, one record at a time.

Of mpinfer's own code nothing takes part but the two errors that `jobs/speaker.py` raises.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

REPO = Path(__file__).resolve().parents[1]
if str(REPO) not in sys.path:  # as the working directory of a run is
    sys.path.insert(0, str(REPO))

Job = dict[str, Any]  # a job file's content
Reference = dict[str | int, dict[str, Any]]  # of each record, the output: labels with scores, or arrays by name


def load_job(story: str) -> Job:
    """The content of a story's job file."""
    job: Job = yaml.safe_load((REPO / "jobs" / f"{story}.yaml").read_text(encoding="utf-8"))
    return job


def missing(story: str) -> list[str]:
    """The files that the job of a story names and that are not there: the job file says what makes them."""
    job = load_job(story)
    model, labels = job["model"], job.get("classify", {}).get("labels")
    factory = ":" in model["path"]
    named = [model["weights"] if factory else model["path"], job["input"]["path"], *([labels] if labels else [])]
    return [path for path in named if not (REPO / path).exists()]


def reference(story: str) -> Reference:
    """Of a story as its job file has it."""
    return _REFERENCES[story](load_job(story))


def small_story(story: str, directory: Path) -> tuple[Path, Reference]:
    """Write a small job with random weights into `directory`; returns its file and what it should give.

    Nothing is downloaded. Factories and data of `jobs/` are used as they are: run it in the repository's root.
    """
    job = load_job(story)
    job["input"]["path"] = str(REPO / job["input"]["path"])
    job["output"]["path"] = str(directory / "out")
    job["parallel"] = {"micro_batch": 2}  # several batches even of four records
    _MAKERS[story](job, directory)
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path, _REFERENCES[story](job)


def named(path: str) -> Any:
    """What `package.module:name` is."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def load_module(job: Job) -> nn.Module:
    """The module of a job's factory, with the job's weights: all of them, and no others."""
    model: nn.Module = named(job["model"]["path"])()
    path = REPO / job["model"]["weights"]
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state, strict=True)
    return model.eval()


def load_image(path: Path, rules: dict[str, Any]) -> torch.Tensor:
    """An image by the rules of a job's section `images`: [3, crop, crop] float32."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    scale = rules["resize"] / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling[rules["interpolation"].upper()])
    left, top = (width - rules["crop"]) // 2, (height - rules["crop"]) // 2
    image = image.crop((left, top, left + rules["crop"], top + rules["crop"]))
    pixels = np.asarray(image, np.float32) / 255
    normal = (pixels - np.float32(rules["mean"])) / np.float32(rules["std"])
    return torch.from_numpy(normal).permute(2, 0, 1).contiguous()


def _classify_images(job: Job) -> Reference:
    model = load_module(job)
    labels = (REPO / job["classify"]["labels"]).read_text(encoding="utf-8").splitlines()
    results: Reference = {}
    for path in _files(job):
        scores = _compute(model, load_image(path, job["images"])).softmax(dim=0)
        best = scores.topk(job["classify"]["top_k"])
        top = [[labels[n], score] for n, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        results[path.name] = {"label": top[0][0], "score": top[0][1], "top": top}
    return results


def _embed_sentences(job: Job) -> Reference:
    from transformers import AutoModel, AutoTokenizer

    directory = REPO / job["model"]["path"]
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    results: Reference = {}
    for line in (REPO / job["input"]["path"]).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        with torch.no_grad():
            (states,) = model(**tokenizer(record["text"], return_tensors="pt")).last_hidden_state
        vector = states.mean(dim=0)
        results[record["id"]] = {"embedding": (vector / vector.norm()).numpy()}
    return results


def _embed_speech(job: Job) -> Reference:
    model, prepare = load_module(job), named(job["model"]["prepare"])
    return {
        path.name: {"embedding": _compute(model, prepare({"audio": str(path)})["mels"]).numpy()} for path in _files(job)
    }


def _forward_unet(job: Job) -> Reference:
    model = load_module(job)
    return {number: {"output": _compute(model, field).numpy()} for number, field in _rows(job)}


def _forward_program(job: Job) -> Reference:
    from jobs import make_program

    model = make_program.build().eval()
    with torch.no_grad():
        outputs = {number: model(field[None]) for number, field in _rows(job)}
    return {
        number: {name: tensor[0].numpy() for name, tensor in tensors.items()} for number, tensors in outputs.items()
    }


def _compute(model: nn.Module, sample: torch.Tensor) -> torch.Tensor:
    """The model's only output of one record."""
    with torch.no_grad():
        output: torch.Tensor = model(sample[None])[0]
    return output


def _files(job: Job) -> list[Path]:
    return sorted((REPO / job["input"]["path"]).iterdir())


def _rows(job: Job) -> Iterator[tuple[int, torch.Tensor]]:
    return enumerate(torch.from_numpy(np.load(REPO / job["input"]["path"])))


def _make_classify_images(job: Job, directory: Path) -> None:
    from jobs import efficientnet

    images = torch.stack([load_image(path, job["images"]) for path in _files(job)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)  # every score of the best far from the next
        model = efficientnet.build()
        # What training would see to: activations that neither vanish nor agree for all images.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # statistics are those of the one batch
        head = model.get_submodule("_fc")
        nn.init.normal_(head.weight, std=1.0)
        with torch.no_grad():
            nn.init.zeros_(head.bias)
            model.train()(images)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):  # a channel that hardly varies would show rounding alone
                    module.running_var.clamp_(min=float(module.running_var.mean()))
            head.bias -= model.eval()(images).mean(dim=0)
    _save(job, model, directory / "weights.pth")
    labels = directory / "labels.txt"
    labels.write_text("".join(f"class {number}\n" for number in range(efficientnet.CLASSES)), encoding="utf-8")
    job["classify"]["labels"] = str(labels)


def _make_embed_sentences(job: Job, directory: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, BertTokenizer

    texts = [json.loads(line)["text"] for line in Path(job["input"]["path"]).read_text(encoding="utf-8").splitlines()]
    split, normalize = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(normalize.normalize_str(text))}
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalize, split
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=128,
        initializer_range=0.2,  # large: vectors far apart
    )
    path = directory / "model"
    BertTokenizer(tokenizer_object=tokenizer, model_max_length=128).save_pretrained(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(path)
    job["model"]["path"] = str(path)


def _make_embed_speech(job: Job, directory: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = named(job["model"]["path"])()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.08)  # large: vectors far apart
    _save(job, model, directory / "weights.pt")


def _make_forward_unet(job: Job, directory: Path) -> None:
    from jobs import unet

    path = directory / "weights.safetensors"
    unet.write_weights(path)
    job["model"]["weights"] = str(path)
    _make_fields(job, directory)


def _make_forward_program(job: Job, directory: Path) -> None:
    from jobs import make_program

    job["model"]["path"] = str(make_program.write_program(directory))
    _make_fields(job, directory)


def _make_fields(job: Job, directory: Path) -> None:
    from jobs import make_fields

    path = directory / "fields.npy"
    np.save(path, make_fields.make_fields(6))
    job["input"]["path"] = str(path)


def _save(job: Job, model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)
    job["model"]["weights"] = str(path)


_REFERENCES: dict[str, Callable[[Job], Reference]] = {
    "classify_images": _classify_images,
    "embed_sentences": _embed_sentences,
    "embed_speech": _embed_speech,
    "forward_unet": _forward_unet,
    "forward_program": _forward_program,
}
_MAKERS: dict[str, Callable[[Job, Path], None]] = {
    "classify_images": _make_classify_images,
    "embed_sentences": _make_embed_sentences,
    "embed_speech": _make_embed_speech,
    "forward_unet": _make_forward_unet,
    "forward_program": _make_forward_program,
}
STORIES = tuple(_REFERENCES)  # that tests/mpi/test_story_layouts.py runs
DECODER_JOBS = ("quickstart",)  # that tests/mpi/test_smollm2.py runs
