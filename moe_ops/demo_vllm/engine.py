"""A program that uses vLLM, as a user's would: ``python -m moe_ops.demo_vllm.engine JOB``, with a `Job` as JSON.

The plugin is in it if ``MOE_OPS_VLLM=1``.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._dynamo.backends.registry import lookup_backend

GRAPHS = "MOE_OPS_DEMO_GRAPHS"
"""Names the directory that `keep_graph` writes to, in whichever process the model is."""


class Job(NamedTuple):
    """What vLLM is to do.

    Attributes:
        model: directory of a checkpoint.
        prompts: token ids of each.
        max_tokens: to generate for each prompt.
        tp: ranks, among which the experts are divided.
        answer: file for what is generated: token ids of each prompt.
    """

    model: str
    prompts: list[list[int]]
    max_tokens: int
    tp: int
    answer: str


def keep_graph(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """A back end of ``torch.compile``: Inductor, after the names of the nodes are written down, a file for each graph."""
    directory = Path(os.environ[GRAPHS])
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    (directory / f"{os.getpid()}-{sum(1 for _ in directory.iterdir())}.json").write_text(json.dumps(names))
    compiled: Callable[..., Any] = lookup_backend("inductor")(graph, inputs)
    return compiled


def main() -> None:
    """Serve the model for the job that the command line names, and write what it generates."""
    from vllm import LLM, SamplingParams
    from vllm.config import CompilationMode

    job = Job(**json.loads(sys.argv[1]))
    engine = LLM(
        job.model,
        tensor_parallel_size=job.tp,
        enable_expert_parallel=job.tp > 1,
        compilation_config={
            "mode": CompilationMode.DYNAMO_TRACE_ONCE,
            "backend": "moe_ops.demo_vllm.engine.keep_graph",
        },
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=len(job.prompts),
        seed=0,
    )
    params = SamplingParams(temperature=0, max_tokens=job.max_tokens, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in job.prompts], params, use_tqdm=False)
    Path(job.answer).write_text(json.dumps([output.outputs[0].token_ids for output in outputs]))


if __name__ == "__main__":
    main()
