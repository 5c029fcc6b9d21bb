"""A job for vLLM on one rank: an engine is made, generates, and is taken down; the process goes on to the next job."""

import gc
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import sympy
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import TracingContext

MAX_TOKENS = 8

graphs: list[list[str]] = []
"""Of the last engine: the names of each compiled graph's nodes that are ops, and not functions."""

guards: list[str] = []
"""Of its graphs, if the mode is of ``_compile``: what was taken for granted meanwhile, and is wrong for other token counts.
vLLM checks none of it later."""

OTHER_COUNTS = 3, 4, 5, 64, 127
"""Not 1 or 2: vLLM's sequence parallelism takes it for granted that a rank has more than one row."""


class Job(NamedTuple):
    """What an engine is to do.

    Attributes:
        model: directory of a checkpoint.
        prompts: for each DP rank, token ids.
        tp, dp, ep: of its ranks; `ep` says whether experts are divided.
        mode: "eager"; "whole", one graph by Dynamo, run as it is; "aot_eager" and "inductor", what those back ends make of it;
            "piecewise", cut at the attention, as vLLM does elsewhere than on a CPU, and run as it is.
        plugin: whether the plugin is in vLLM.
        settings: ``additional_config["moe_ops"]``.
        max_tokens: for each prompt, or one number for all.
    """

    model: str
    prompts: Sequence[Sequence[Sequence[int]]]
    tp: int = 1
    dp: int = 1
    ep: bool = False
    mode: str = "eager"
    plugin: bool = True
    settings: dict[str, Any] = {}  # noqa: RUF012  # nobody writes to it
    max_tokens: int | tuple[int, ...] = MAX_TOKENS

    @property
    def world_size(self) -> int:
        return self.tp * self.dp


class Answer(NamedTuple):
    """What was generated for one prompt: token ids, and the log-probability of each."""

    token_ids: list[int]
    logprobs: list[float]


class Result(NamedTuple):
    """What a rank made of a job: an answer for each prompt, the graphs and guards."""

    answers: list[Answer]
    graphs: list[list[str]]
    guards: list[str]


def keep_graph(graph: torch.fx.GraphModule) -> None:
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    graphs.append([name for name in names if not name.startswith("<")])


def whole(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    """A back end of ``torch.compile``, as the next two are."""
    keep_graph(graph)
    return graph.forward


def aot_eager(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    return _compile("aot_eager", graph, inputs)


def inductor(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    return _compile("inductor", graph, inputs)


def _compile(backend: str, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    keep_graph(graph)
    compiled = lookup_backend(backend)(graph, inputs)
    for guard in TracingContext.get().fake_mode.shape_env.guards:
        sizes = guard.expr.free_symbols  # of several arguments, one count each
        if any(guard.expr.xreplace(dict.fromkeys(sizes, sympy.Integer(count))) != sympy.true for count in OTHER_COUNTS):
            guards.append(str(guard.expr))
    return compiled


BACKENDS = whole.__name__, aot_eager.__name__, inductor.__name__


def run_job(job: Job, rank: int, port: int) -> Result:
    """The part of one rank."""
    from vllm import SamplingParams

    _set_plugin(job.plugin)
    _number_groups_from(port)
    gc.freeze()  # what vLLM imports is much to look through, in each of its many collections
    graphs.clear()
    guards.clear()
    torch._dynamo.reset()
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    engine = _make_engine(job)
    try:
        prompts = job.prompts[rank // job.tp]
        lengths = [job.max_tokens] * len(prompts) if isinstance(job.max_tokens, int) else job.max_tokens[: len(prompts)]
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            params = SamplingParams(temperature=0, max_tokens=length, logprobs=1, ignore_eos=True, detokenize=False)
            engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, params)
        answers: dict[int, Answer] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    answers[int(output.request_id)] = _answer_of(output.outputs[0])
        return Result([answers[index] for index in range(len(prompts))], list(graphs), list(guards))
    finally:
        _take_down(engine, port)


def _make_engine(job: Job) -> Any:
    from vllm.config import CompilationMode
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    compilation = {}
    if job.mode in BACKENDS:
        compilation = {"mode": CompilationMode.DYNAMO_TRACE_ONCE, "backend": f"{__name__}.{job.mode}"}
    config = EngineArgs(
        model=job.model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        num_gpu_blocks_override=64,
        seed=0,
        disable_log_stats=True,
        enforce_eager=job.mode == "eager",
        compilation_config=compilation,
        tensor_parallel_size=job.tp,
        data_parallel_size=job.dp,
        enable_expert_parallel=job.ep,
        distributed_executor_backend="external_launcher" if job.world_size > 1 else None,
        additional_config={"moe_ops": job.settings} if job.settings else {},
    ).create_engine_config()
    if job.mode == "piecewise":  # which vLLM takes back on a CPU
        compilation = config.compilation_config
        compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "eager"
        compilation.splitting_ops, compilation.compile_sizes = None, []
        compilation.set_splitting_ops_for_v1("allgather_reducescatter", job.dp)
        _keep_pieces()
    return LLMEngine(vllm_config=config, executor_class=Executor.get_class(config), log_stats=False)


@cache
def _keep_pieces() -> None:
    """Let vLLM's back end that compiles nothing keep what it is given."""
    from vllm.compilation.compiler_interface import EagerAdaptor

    compile_piece = EagerAdaptor.compile

    def compile_and_keep(self: Any, graph: torch.fx.GraphModule, inputs: list[Any], *args: Any) -> Any:
        keep_graph(graph)
        return compile_piece(self, graph, inputs, *args)

    EagerAdaptor.compile = compile_and_keep


def _answer_of(output: Any) -> Answer:
    chosen = zip(output.token_ids, output.logprobs, strict=True)
    return Answer(list(output.token_ids), [position[token].logprob for token, position in chosen])


def _set_plugin(is_wanted: bool) -> None:
    """As a process with or without ``MOE_OPS_VLLM=1`` would have it."""
    from vllm.model_executor.custom_op import op_registry_oot

    from moe_ops.integrations import vllm as plugin

    op_registry_oot.pop("MoERunner", None)
    os.environ[plugin.VARIABLE] = "1" if is_wanted else "0"
    plugin.register()


def _number_groups_from(number: int) -> None:
    """vLLM's shared memory is named by its groups, which are numbered; a number that no other job has keeps them apart, the
    memory of a killed one included."""
    from vllm.distributed import parallel_state

    parallel_state._group_name_counter.update(dict.fromkeys(parallel_state._group_name_counter | {"tp": 0}, number))


def _take_down(engine: Any, number: int) -> None:
    """What vLLM leaves to the end of the process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    for path in Path("/dev/shm").glob(f"*:{number}-*-cpushm_*"):
        path.unlink(missing_ok=True)
