"""vLLM's engine on the ranks of a benchmark: made once, then asked for steps of one kind."""

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import moe_ops as mo
from benchmarks.timing import Timing, median

LONGEST = 576  # tokens of a prompt and what is generated
MAX_BATCHED = 512  # tokens of a step
MAX_REQUESTS = 8


@dataclass(frozen=True)
class Serving:
    """How an engine is set up.

    Attributes:
        name: as the tables show it.
        plugin: whether the plugin is in it.
        ep: whether experts are divided among ranks.
    """

    name: str
    plugin: bool
    ep: bool = False


class Load(NamedTuple):
    """What an engine is asked for: `requests` prompts of `prompt` tokens, and `steps` steps of decode (0: the prefill is
    timed)."""

    requests: int
    prompt: int
    steps: int


class Memory(NamedTuple):
    """Of a rank, in bytes: resident now, and at most."""

    now: int
    peak: int


@dataclass
class _State:
    engine: Any = None
    count: int = 0  # of requests


_state = _State()  # of this process, which has one engine


def make_engine(group: mo.Group, model: str, serving: Serving, dtype: str, is_eager: bool, number: int) -> None:
    """Load a model.

    Args:
        group: of all ranks.
        model: directory of a checkpoint.
        serving: how.
        dtype: that vLLM computes in.
        is_eager: else compiled, as vLLM does by itself on a CPU.
        number: one that no other engine has, for the names of vLLM's shared memory.
    """
    from moe_ops.integrations import vllm as plugin

    os.environ.update(RANK=str(group.rank), LOCAL_RANK=str(group.rank), WORLD_SIZE=str(group.size))
    os.environ[plugin.VARIABLE] = "01"[serving.plugin]
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    parallel_state._group_name_counter["tp"] = number
    _state.engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=model,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=LONGEST,
            max_num_seqs=MAX_REQUESTS,
            max_num_batched_tokens=MAX_BATCHED,
            enable_prefix_caching=False,
            enforce_eager=is_eager,
            disable_log_stats=True,
            tensor_parallel_size=group.size,
            enable_expert_parallel=serving.ep,
            distributed_executor_backend="external_launcher" if group.size > 1 else None,
        )
    )


def run_load(group: mo.Group, load: Load) -> Timing:
    """The time of one step of the kind that the load is about."""
    from vllm import SamplingParams

    engine = _state.engine
    params = SamplingParams(temperature=0, max_tokens=load.steps + 1, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(load.requests):
        prompt = torch.randint(500, (load.prompt,), generator=generator).tolist()
        engine.add_request(str(_state.count), {"prompt_token_ids": prompt}, params)
        _state.count += 1
    steps = []
    while engine.has_unfinished_requests():
        wall, cpu = time.perf_counter(), time.thread_time()
        engine.step()
        steps.append(Timing(time.perf_counter() - wall, time.thread_time() - cpu))
    if load.steps == 0:
        return Timing(sum(step.wall for step in steps), sum(step.cpu for step in steps))
    return median(steps[1:])


def end_engine(group: mo.Group) -> None:
    """What vLLM leaves to the end of the process, when the group of all ranks is gone."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()


def read_memory(group: mo.Group) -> Memory:
    """What the process takes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Memory(pages * resource.getpagesize(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
