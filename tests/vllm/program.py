"""A program that uses vLLM as a user's does, compiled and with vLLM's caches: ``python -m tests.vllm.program MODEL``.

It prints, as its last line, the tokens that it generates and the ops that ran while it did.
"""

import json
import sys

PROMPTS = [[1, 2, 3, 4, 5], [7]]


def main() -> None:
    import torch
    from vllm import LLM, SamplingParams

    engine = LLM(
        sys.argv[1],
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=4,
        seed=0,
    )
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    with torch.profiler.profile() as profile:
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    ops = sorted({event.key for event in profile.key_averages() if "moe" in event.key})
    print(json.dumps({"tokens": [list(output.outputs[0].token_ids) for output in outputs], "ops": ops}))


if __name__ == "__main__":
    main()
