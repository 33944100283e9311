"""What int8 costs: perplexity on the prompts of a JSONL file and greedy agreement, against float32.

python benchmarks/int8_quality.py MODEL PROMPTS.jsonl [RECORDS] [NEW_TOKENS]
"""

import json
import math
import sys
from pathlib import Path

import torch

from mpinfer.generate.cache import KVCache, PackedStep
from mpinfer.generate.scheduler import Segment
from mpinfer.models.decoder import DecoderPart, DecoderSkeleton


def load(directory: Path, quantize: str) -> DecoderPart:
    skeleton = DecoderSkeleton(directory, "float32", quantize)
    blocks = len(skeleton.layers) + 2
    return skeleton.load_part(0, blocks, "cpu", 32, lambda: None, range(skeleton.vocabulary))


def logits(part: DecoderPart, cache: KVCache, ids: list[int], start: int, every: bool) -> torch.Tensor:
    """Of each of the ids, which stand at `start` in the one sequence, or of the last: [ids or 1, vocabulary]."""
    step = PackedStep(cache, [Segment(0, start, len(ids), len(ids) if every else 1)], part.kernels)
    return part.logits(step.sampled(part(torch.tensor(ids), step.positions, step)))


def negative_log_likelihood(part: DecoderPart, ids: list[int]) -> float:
    scores = logits(part, KVCache(1, len(ids), "cpu"), ids, 0, every=True)[:-1].log_softmax(-1)
    return -scores[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum().item()


def greedy(part: DecoderPart, ids: list[int], new_tokens: int) -> list[int]:
    cache, tokens, start = KVCache(1, len(ids) + new_tokens, "cpu"), list(ids), 0
    while len(tokens) < len(ids) + new_tokens:
        fresh = logits(part, cache, tokens[start:], start, every=False).argmax().item()
        start = len(tokens)
        tokens.append(int(fresh))
    return tokens[len(ids) :]


def main(directory: Path, prompts: Path, records: int = 24, new_tokens: int = 32) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [json.loads(line)["prompt"] for line in prompts.read_text(encoding="utf-8").splitlines()]
    longest = sorted(texts, key=len)[-records:]
    encoded = [tokenizer(text).input_ids for text in longest]
    perplexity, answers = {}, {}
    for quantize in ("float32", "int8"):
        part = load(directory, "none" if quantize == "float32" else quantize)
        total = sum(negative_log_likelihood(part, ids) for ids in encoded)
        perplexity[quantize] = math.exp(total / sum(len(ids) - 1 for ids in encoded))
        answers[quantize] = [greedy(part, ids[:32], new_tokens) for ids in encoded]
        print(
            f"{quantize}: perplexity {perplexity[quantize]:.3f}, weights {part.weight_bytes / 1e6:.1f} MB", flush=True
        )
    pairs = list(zip(answers["float32"], answers["int8"], strict=True))
    same = [next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), new_tokens) for x, y in pairs]
    print(f"perplexity: {perplexity['int8'] / perplexity['float32'] - 1:+.2%}")
    print(f"equal tokens before the first divergence: {sum(same) / (len(same) * new_tokens):.1%}")
    print(f"identical records: {sum(n == new_tokens for n in same) / len(same):.1%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
