"""The adapter for vllm-ascend, in its own layers.

vllm-ascend's source is the real one, of the release that the adapter was written to, on four gloo ranks; torch_npu and all of
Ascend's kernels are stand-ins (`ascend_stand_in`). So this tests that the adapter meets vllm-ascend's interfaces and that a
layer computes what it should. It tests no NPU, no engine and no speed.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.ranks import RankPool, pool_of_ranks

from .ascend_ranks import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    Layout,
    make_worker,
    methods,
    plugin_and_vllm_ascend,
    reasons_of,
    register_in,
    run_both_methods,
    run_layer,
    run_left_layer,
    run_with_milestones,
    step_of,
)
from .ascend_stand_in import SOURCE

MoEActivation = pytest.importorskip("vllm.model_executor.layers.fused_moe.activation").MoEActivation
pytestmark = pytest.mark.skipif(
    not (SOURCE / "vllm_ascend").exists(), reason=f"vllm-ascend's source is not in {SOURCE} (docs/vllm.md says how)"
)

TP4, DP2 = Layout(1, 4), Layout(2, 2)
SHARDED = Layout(2, 2, is_sequence_parallel=True)
STEPS = [
    (layout, method, counts)
    for layout, all_counts in {
        TP4: ([5], [1], [8]),
        DP2: ([5, 2], [1, 6], [4, 4]),
        SHARDED: ([5, 2], [1, 6], [4, 4]),
    }.items()
    for counts in all_counts
    for method in ("ALLGATHER", "ALLTOALL", "MC2")
]
STEPS += [(Layout(1, 4, ep=False), "ALLGATHER", [5]), (Layout(2, 2, ep=False), "ALLGATHER", [5, 2])]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    yield from pool_of_ranks(4, tmp_path_factory)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    yield from pool_of_ranks(1, tmp_path_factory)


def draw_weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) / HIDDEN**0.5
    return w13, torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) / INTERMEDIATE**0.5


def draw_tokens(counts: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, HIDDEN, generator=generator), torch.randn(n, EXPERTS, generator=generator)) for n in counts]


def expected(x_TH: torch.Tensor, logits_TE: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """The layer, token by token, in float64."""
    rows = []
    for x, logits in zip(x_TH.double(), logits_TE.double(), strict=True):
        weights, ids = logits.softmax(0).topk(TOP_K)
        outputs = []
        for weight, expert in zip(weights / weights.sum(), ids, strict=True):
            gate, up = (w13[expert].double() @ x).chunk(2)
            outputs.append(weight * (w2[expert].double() @ (F.silu(gate) * up)))
        rows.append(sum(outputs))
    return torch.stack(rows).float()  # type: ignore[arg-type]


def name_of(value: Any) -> str | None:
    if isinstance(value, Layout):
        return (
            f"dp{value.dp}tp{value.tp}" + ("" if value.ep else "-noep") + ("-sp" if value.is_sequence_parallel else "")
        )
    return "-".join(map(str, value)) if isinstance(value, list) else None


@pytest.mark.parametrize(("layout", "method", "counts"), STEPS, ids=name_of)
def test_a_layer_computes_what_it_should(ranks: RankPool, layout: Layout, method: str, counts: list[int]) -> None:
    weights, tokens = draw_weights(), draw_tokens(counts)
    for rank, (runner, experts, reason, result) in enumerate(ranks.run(run_layer, layout, method, weights, tokens)):
        assert (runner, experts, reason) == ("AscendMoERunner", "MoeOpsRoutedExperts", None)
        wanted = expected(*tokens[rank // layout.tp], *weights)
        if layout.is_sequence_parallel:
            rows = -(-len(wanted) // layout.tp)
            wanted = wanted[rank % layout.tp * rows :][:rows]
            assert result.shape == (rows, HIDDEN)
            result = result[: len(wanted)]
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "method", "counts"),
    [
        step
        for step in STEPS
        if step[1] != "ALLTOALL" or all(n % step[0].tp == 0 for n in step[2]) or step[0] == SHARDED
    ],
    ids=name_of,
)
def test_rows_are_those_of_its_own_method(ranks: RankPool, layout: Layout, method: str, counts: list[int]) -> None:
    """Its ALLTOALL cuts unevenly where TP does not divide the tokens, and this library never does: those are left out."""
    for theirs, ours in ranks.run(run_both_methods, layout, method, draw_weights(), draw_tokens(counts)):
        for name, their, our in zip(("rows", "logits", "mask", "finalized"), theirs, ours, strict=True):
            assert (their is None) == (our is None), name
            if their is not None:
                torch.testing.assert_close(our, their, msg=lambda text, name=name: f"{name}: {text}")


def test_methods_have_strategies(one_rank: RankPool) -> None:
    ((theirs, ours),) = one_rank.run(methods)
    assert set(theirs) - set(ours) == {"FUSED_MC2"}
    assert set(ours) <= set(theirs)


def test_a_fused_step_is_refused(one_rank: RankPool) -> None:
    (message,) = one_rank.run(fused_step)
    assert "moe_comm_type must be one of ['ALLGATHER', 'ALLTOALL', 'MC2'], got MoECommType.FUSED_MC2" in message


def fused_step(rank: int) -> Any:
    return step_of(rank, "FUSED_MC2")


def step_with_a_short_mask(rank: int) -> Any:
    return step_of(rank, "MC2", padded_num_tokens=8, mc2_mask=torch.tensor([True, True, False, False, False]))


def test_a_mask_that_ends_early_is_padded(one_rank: RankPool) -> None:
    """Its buffer has max_num_batched_tokens elements, which TP need not divide."""
    ((strategy, lengths),) = one_rank.run(step_with_a_short_mask)
    assert strategy.name == "MC2"
    assert lengths.mask.tolist() == [True, True] + 6 * [False]


COPIES = "its experts have copies or are moved"
LOOKUP = "its router looks token ids up"
PADDED = "hidden states or weights are padded"
LEFT: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"quant_method": torch.nn.Identity()}, "its experts are quantised (Identity)"),
    ({"moe_config.activation": MoEActivation.GELU}, "its activation is gelu"),
    ({"swiglu_limit": 7.0}, "limit, alpha and beta of its SwiGLU are (7.0, None, None)"),
    ({"moe_config.moe_parallel_config.ep_size": 3}, f"{EXPERTS} experts are not divided evenly by 3 ranks"),
    ({"moe_config.num_logical_experts": EXPERTS - 1}, COPIES),
    ({"dynamic_eplb": True}, COPIES),
    ({"log2phy": torch.arange(EXPERTS)}, COPIES),
    ({"router.eplb_state": object()}, COPIES),
    ({"expert_map_manager._placement_strategy": "round_robin"}, "its experts are not placed in order"),
    ({"mix_placement": True}, "shared experts are fused with the routed ones"),
    ({"tid2eid": torch.zeros(1)}, LOOKUP),
    ({"router.bias_vl": torch.zeros(1)}, LOOKUP),
    ({"moe_config.hidden_dim_unpadded": HIDDEN - 1}, PADDED),
    ({"moe_config.intermediate_size_per_partition_unpadded": INTERMEDIATE - 1}, PADDED),
    ({"moe_config.moe_parallel_config.pcp_size": 2}, "of prefill context parallelism"),
    ({"moe_config.is_lora_enabled": True}, "of LoRA"),
    ({"enable_npugraph_ex_static_kernel": True}, "of static kernels"),
    ({"is_kv_consumer": True}, None),
    (
        {"is_kv_consumer": True, "moe_config.moe_parallel_config.dp_size": 2},
        "DP ranks that consume a KV cache need not tell each other their token counts",
    ),
    ({"returns_choices": True}, "chosen experts are to be returned"),
]


def test_what_is_left_to_vllm_ascend(one_rank: RankPool) -> None:
    (reasons,) = one_rank.run(reasons_of, [changes for changes, _ in LEFT], draw_weights())
    assert reasons == [reason for _, reason in LEFT]


def test_a_layer_that_is_left_runs_as_before(one_rank: RankPool) -> None:
    ((result, arguments),) = one_rank.run(run_left_layer, draw_weights())
    assert (result, arguments) == ("theirs", {"hidden_states": 1, "router_logits": 2, "input_ids": 3})


def test_shared_experts_wait_for_nothing_inside(one_rank: RankPool) -> None:
    """vllm-ascend's fused methods have no points inside either, so its shared experts can do without."""
    assert one_rank.run(run_with_milestones, draw_weights(), draw_tokens([3])) == [False]


@pytest.mark.parametrize(
    ("version", "asked", "registered", "error", "after"),
    [
        ("0.30.0rc2", "1", "theirs", None, "MoeOpsRoutedExperts"),
        ("0.30.0rc2", "0", "theirs", None, "AscendRoutedExperts"),
        (
            "0.31.0",
            "1",
            "theirs",
            "moe_ops: MOE_OPS_VLLM=1 needs vllm-ascend 0.30.*, got 0.31.0",
            "AscendRoutedExperts",
        ),
        ("0.31.0", "0", "theirs", None, "AscendRoutedExperts"),
        (
            "0.30.0",
            "1",
            "nothing",
            "moe_ops: vllm-ascend must have registered AscendRoutedExperts, got None",
            "nothing",
        ),
        ("0.30.0", "1", "another", "must have registered AscendRoutedExperts, got <class 'dict'>", "dict"),
    ],
)
def test_registers_if_asked(
    one_rank: RankPool, version: str, asked: str, registered: str, error: str | None, after: str
) -> None:
    ((found_error, found),) = one_rank.run(register_in, version, asked, registered)
    assert found == after
    assert found_error is None if error is None else error in found_error


def test_the_worker_registers_after_vllm_ascend(one_rank: RankPool) -> None:
    assert one_rank.run(make_worker) == [["theirs 1", "ours"]]


def test_the_plugin_of_vllm_stands_back(one_rank: RankPool) -> None:
    """Elsewhere it registers a runner, after which vllm-ascend could not: its worker would fail."""
    assert one_rank.run(plugin_and_vllm_ascend, "cpu") == [("MoeOpsRunner", "Duplicate op name: MoERunner")]
    assert one_rank.run(plugin_and_vllm_ascend, "npu") == [("nothing", "AscendMoERunner")]
