"""Greedy generation with transformers' `generate`, for compare.py. The last line of its output is JSON.

    OMP_NUM_THREADS=2 python transformers_run.py MODEL_DIR RECORDS.jsonl NEW_TOKENS

Records go in batches of 16, sorted by length and padded on the left. Loading and a warm-up are not timed.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

_BATCH = 16
_WARM_UP_TOKENS = 4


def main(directory: str, records: str, new_tokens: str) -> None:
    lines = [json.loads(line) for line in Path(records).read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: len(line["token_ids"]))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    generate_batch(model, lines[:_BATCH], _WARM_UP_TOKENS)
    outputs: dict[str, list[int]] = {}
    started = time.perf_counter()
    for start in range(0, len(lines), _BATCH):
        outputs |= generate_batch(model, lines[start : start + _BATCH], int(new_tokens))
    wall_s = time.perf_counter() - started
    print(json.dumps({"version": transformers.__version__, "wall_s": wall_s, "outputs": outputs}))


@torch.inference_mode()
def generate_batch(model: Any, lines: list[dict[str, Any]], new_tokens: int) -> dict[str, list[int]]:
    """The new tokens of each record, to its stop token."""
    stop = model.generation_config.eos_token_id
    stops = {stop} if isinstance(stop, int) else set(stop or ())
    length = max(len(line["token_ids"]) for line in lines)
    padding = [length - len(line["token_ids"]) for line in lines]
    ids = torch.tensor([[0] * pad + line["token_ids"] for pad, line in zip(padding, lines, strict=True)])
    mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()
    result = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=min(stops, default=0),
    )
    return {line["id"]: _cut(row, stops) for line, row in zip(lines, result[:, length:].tolist(), strict=True)}


def _cut(tokens: list[int], stops: set[int]) -> list[int]:
    """Without what follows the first stop token."""
    end = next((index + 1 for index, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


if __name__ == "__main__":
    main(*sys.argv[1:])
