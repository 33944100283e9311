"""Greedy generation with vLLM's offline `LLM`, for compare.py. Its figures are a line of JSON among the output.

    python vllm_run.py MODEL_DIR RECORDS.jsonl NEW_TOKENS PIPELINE_STAGES

Loading and one warm-up run of a few records are not timed.
"""

import json
import sys
import time
from pathlib import Path

_WARM_UP_RECORDS = 4


def main(model: str, records: str, new_tokens: str, stages: str) -> None:
    import vllm  # type: ignore[import-not-found]  # in an environment of its own

    lines = [json.loads(line) for line in Path(records).read_text(encoding="utf-8").splitlines()]
    llm = vllm.LLM(
        model=model,
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=64,
        enable_prefix_caching=False,
        pipeline_parallel_size=int(stages),
    )
    prompts = [{"prompt_token_ids": line["token_ids"]} for line in lines]
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=int(new_tokens))
    llm.generate(prompts[:_WARM_UP_RECORDS], greedy, use_tqdm=False)
    started = time.perf_counter()
    results = llm.generate(prompts, greedy, use_tqdm=False)
    wall_s = time.perf_counter() - started
    outputs = {line["id"]: list(result.outputs[0].token_ids) for line, result in zip(lines, results, strict=True)}
    print(json.dumps({"version": vllm.__version__, "wall_s": wall_s, "outputs": outputs}), flush=True)


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(*sys.argv[1:])
