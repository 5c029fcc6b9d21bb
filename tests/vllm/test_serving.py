"""Models served by vLLM with the plugin answer as they do without it: greedy tokens, and their log-probabilities.

vLLM on one rank is what all topologies are held to; on a CPU it has no expert parallelism and no data parallelism of its own.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import Stock
from .engines import Answer, Job, Result
from .models import COMMON, MODELS, VOCABULARY, write_model
from .ranks import EnginePool

TOLERANCE = 1e-4  # of a log-probability, in float32
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12]]
FORMS: dict[str, dict[str, Any]] = {
    "allgather": {},
    "allgather-unpacked": {"packed_payload": False},
    "all2all": {"strategy": "all2all"},
    "all2all-fixed": {"strategy": "all2all", "dispatch": "fixed_capacity"},
    "mc2": {"strategy": "mc2"},
}
TOPOLOGIES: dict[str, tuple[int, int, bool, list[str]]] = {
    "tp2": (2, 1, False, ["allgather"]),
    "tp2-ep": (2, 1, True, list(FORMS)),
    "dp2": (1, 2, False, ["allgather"]),
    "dp2-ep": (1, 2, True, ["allgather", "all2all", "all2all-fixed", "mc2"]),
    "tp2-dp2-ep": (2, 2, True, ["allgather", "all2all", "all2all-fixed", "mc2"]),
}
"""TP, DP, whether experts are divided, and the forms of the stage. With all, vLLM gives each rank a part of the tokens."""


def differ(found: list[Answer], expected: list[Answer]) -> bool:
    return [answer.token_ids for answer in found] != [answer.token_ids for answer in expected] or any(
        abs(a - b) > TOLERANCE
        for one, other in zip(found, expected, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    )


def check(found: list[Answer], expected: list[Answer]) -> None:
    assert not differ(found, expected), f"{found}\nwhere stock vLLM has\n{expected}"


def tp_of_stock(name: str) -> int:
    """vLLM's own latent attention on a CPU answers otherwise on two ranks of TP than on one, and then otherwise in other
    batches."""
    return 2 if name.startswith("deepseek") else 1


def check_graph(result: Result) -> None:
    """One graph for all counts, of which the stage is a part: no op of vLLM's stands for it."""
    (nodes,) = result.graphs
    for op in ("moe_ops.route", "moe_ops.vllm_cpu_experts"):
        assert any(op in node for node in nodes), f"{op} is not in {nodes}"
    assert not [node for node in nodes if "moe_forward" in node]
    assert result.guards == []


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "whole") for name in MODELS), *((name, "eager") for name in ("qwen3", "gpt_oss"))]
)
def test_models_answer_as_without_the_plugin(
    engines: EnginePool, stock: Stock, models: Path, name: str, mode: str
) -> None:
    model = str(write_model(name, models))
    (result,) = engines.run(Job(model, [PROMPTS], mode=mode))
    check(result.answers, stock(model, PROMPTS, mode))
    if mode == "whole":
        check_graph(result)


def test_another_weight_is_seen(engines: EnginePool, stock: Stock, models: Path, qwen3: str) -> None:
    """Or equal answers would show nothing."""
    changed = models / "changed"
    changed.mkdir()
    weights = load_file(f"{qwen3}/model.safetensors")
    weights["model.layers.0.mlp.experts.3.down_proj.weight"] *= 1.5
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    (changed / "config.json").write_text(Path(qwen3, "config.json").read_text())
    (result,) = engines.run(Job(str(changed), [PROMPTS]))
    assert differ(result.answers, stock(qwen3, PROMPTS))


@pytest.mark.parametrize(
    ("topology", "form", "mode"),
    [
        (topology, form, mode)
        for topology, (_, _, _, forms) in TOPOLOGIES.items()
        for form in forms
        for mode in ("eager", "whole")
        if mode == "whole"
        or (topology, form) in (("tp2-dp2-ep", "allgather"), ("dp2-ep", "all2all"), ("tp2-ep", "mc2"))
    ],
)
def test_topologies_answer_as_one_rank(
    engines: EnginePool, stock: Stock, qwen3: str, topology: str, form: str, mode: str
) -> None:
    """DP ranks have prompts of other numbers and lengths."""
    tp, dp, ep, _ = TOPOLOGIES[topology]
    prompts = [PROMPTS[1:2], PROMPTS][-dp:]
    results = engines.run(Job(qwen3, prompts, tp, dp, ep, mode, settings=FORMS[form]))
    expected = stock(qwen3, PROMPTS)
    for rank, result in enumerate(results):
        check(result.answers, expected if rank // tp == dp - 1 else expected[1:2])
        if mode == "whole":
            check_graph(result)


@pytest.mark.parametrize(
    ("topology", "form"),
    [("tp2-ep", "all2all"), ("tp2-ep", "mc2"), ("dp2-ep", "allgather"), ("dp2-ep", "all2all-fixed")],
)
def test_compiled_by_inductor(engines: EnginePool, stock: Stock, qwen3: str, topology: str, form: str) -> None:
    """Where a guard held for the first count alone, its code would write beyond its buffers for others."""
    tp, dp, ep, _ = TOPOLOGIES[topology]
    results = engines.run(Job(qwen3, [PROMPTS[1:2], PROMPTS][-dp:], tp, dp, ep, "inductor", settings=FORMS[form]))
    check(results[-1].answers, stock(qwen3, PROMPTS))
    for result in results:
        check_graph(result)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("qwen2", "allgather"),
        ("qwen2", "mc2"),
        ("deepseek3", "allgather"),
        ("deepseek3", "all2all"),
        ("gpt_oss", "allgather"),
        ("gpt_oss", "mc2"),
    ],
)
def test_models_answer_alike_with_divided_experts(
    engines: EnginePool, stock: Stock, models: Path, name: str, form: str
) -> None:
    """Shared experts, a correction bias and biases of experts, none of them added twice."""
    model = str(write_model(name, models))
    results = engines.run(Job(model, [PROMPTS], tp=2, ep=True, settings=FORMS[form]))
    expected = stock(model, PROMPTS, tp=tp_of_stock(name))
    for result in results:
        check(result.answers, expected)


@pytest.mark.parametrize("form", ["allgather", "mc2"])
def test_shared_experts_of_sharded_tokens(engines: EnginePool, stock: Stock, models: Path, form: str) -> None:
    """vLLM scales the routed experts' output where it is, which must be no view."""
    model, prompts = str(write_model("deepseek2", models)), [PROMPTS, PROMPTS[:1]]
    results = engines.run(Job(model, prompts, tp=2, dp=2, ep=True, mode="aot_eager", settings=FORMS[form]))
    for rank, result in enumerate(results):
        check_graph(result)
        check(result.answers, stock(model, prompts[rank // 2], mode="whole", tp=tp_of_stock("deepseek2")))


@pytest.mark.parametrize("form", ["allgather", "all2all", "mc2"])
def test_a_rank_without_requests_keeps_step(engines: EnginePool, stock: Stock, qwen3: str, form: str) -> None:
    """vLLM lets it run with a token of no request."""
    results = engines.run(Job(qwen3, [[], PROMPTS], dp=2, ep=True, settings=FORMS[form]))
    assert not results[0].answers
    check(results[1].answers, stock(qwen3, PROMPTS))


def test_a_strategy_that_is_chosen_for_the_user(engines: EnginePool, stock: Stock, qwen3: str) -> None:
    """By collectives that are timed while the model is loaded: on all ranks the same."""
    job = Job(qwen3, [PROMPTS[1:2], PROMPTS], dp=2, ep=True, mode="whole", settings={"strategy": "auto"})
    results = engines.run(job)
    check(results[1].answers, stock(qwen3, PROMPTS))
    check_graph(results[0])
    assert results[0].graphs == results[1].graphs


def test_continuous_batching(engines: EnginePool, stock: Stock, qwen3: str) -> None:
    """More requests than fit, of one token and of many, that end at different steps: others take their places."""
    lengths = (1, 9, 3, 12, 5, 1, 7, 2)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in (3, 1, 40, 7, 1, 12, 64, 2)]
    expected = engines.run(Job(qwen3, [prompts], mode="whole", plugin=False, max_tokens=lengths))[0].answers
    job = Job(qwen3, [prompts, prompts[2:4]], dp=2, ep=True, mode="whole", max_tokens=lengths)
    found = engines.run(job)
    check(found[0].answers, expected)
    check_graph(found[0])


@pytest.mark.parametrize("dp", [1, 2])
def test_piecewise(engines: EnginePool, stock: Stock, qwen3: str, dp: int) -> None:
    """The stage of each layer is in one of the pieces between its attention and the next."""
    results = engines.run(Job(qwen3, [PROMPTS[1:2], PROMPTS][-dp:], dp=dp, ep=dp > 1, mode="piecewise"))
    check(results[-1].answers, stock(qwen3, PROMPTS, "piecewise"))
    for result in results:
        pieces = [nodes for nodes in result.graphs if any("moe_ops.route" in node for node in nodes)]
        assert len(pieces) == COMMON["num_hidden_layers"]
        for nodes in pieces:
            assert any("moe_ops.vllm_cpu_experts" in node for node in nodes)
            assert not [node for node in nodes if "attention" in node]
