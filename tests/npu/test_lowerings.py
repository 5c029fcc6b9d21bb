"""Each lowering: what it launches, and that its results have the shapes and dtypes of the op on any other device.

Called on tensors of the stand-in, the wheel checks the arguments in its own host code and launches; under FakeTensorMode its
meta functions give the shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_ops as mo
from fake_impls.route import RouteSettings
from moe_ops import Quant
from moe_ops._library import KERNELS
from moe_ops.backends import npu_mc2
from moe_ops.backends.npu_kernels import KEY
from moe_ops.experts import run_experts
from moe_ops.groups import Group
from tests.device_graphs import MC2, E, Form, H, I, make_experts, make_stage

from . import STAND_IN
from .layers import LAYERS, make_inputs
from .stand_in import StandIn

IS_A5 = STAND_IN.chip.startswith("Ascend950")
ROUTING = RouteSettings(top_k=3)


class Case(NamedTuple):
    """An op, its arguments (tensors as shapes with a dtype), and the kernels that it launches first to last, among others."""

    op: str
    arguments: tuple[Any, ...]
    kernels: tuple[str, ...]


class Like(NamedTuple):
    """A tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16


def route(is_active: Like | None = None, **changes: Any) -> tuple[Any, ...]:
    return (Like((6, 16), torch.float32), is_active, *ROUTING._replace(**changes))


GATING = ("MoeGatingTopK", "Gather")
GROUPS = {"scoring": "sigmoid", "num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
CASES = {
    "int8": Case("quantize_int8", (Like((6, 64)),), ("DynamicQuant",)),
    "int8-one-row": Case("quantize_int8", (Like((1, 64), torch.float16),), ("DynamicQuant",)),
    "int8-float32": Case("quantize_int8", (Like((6, 64), torch.float32),), ("Round",)),
    "mxfp8": Case("quantize_mxfp8", (Like((6, 64)),), ("DynamicMxQuant",)),
    "mxfp8-ragged": Case("quantize_mxfp8", (Like((6, 72)),), ("DynamicMxQuant",)),
    "mxfp4": Case("quantize_mxfp4", (Like((6, 64)),), ("DynamicMxQuant",)),
    "softmax": Case("route", route(), (*GATING, "Div")),
    "softmax-raw": Case("route", route(renormalize=False), GATING),
    "sigmoid": Case("route", route(scoring="sigmoid", renormalize=False), GATING),
    "groups": Case("route", route(**GROUPS, e_score_correction_bias=Like((16,), torch.float32)), GATING),
    "masked": Case("route", route(Like((6,), torch.bool)), (*GATING, "SWhere")),
    "small-groups": Case("route", route(num_expert_group=8, topk_group=2), ("Softmax", "Sort")),
    "sqrtsoftplus": Case("route", route(scoring="sqrtsoftplus"), ("Softplus", "Sort")),
    "permute": Case("permute_by_expert", ([Like((6, 64))], Like((6, 3), torch.int32), 2, 4), ("MoeInitRouting",)),
    "permute-scaled": Case(
        "permute_by_expert",
        ([Like((6, 64), torch.int8), Like((6,), torch.float32)], Like((6, 3), torch.int64), 0, 4),
        ("MoeInitRouting", "IndexSelect"),
    ),
    "permute-bytes": Case(
        "permute_by_expert",
        ([Like((6, 64), torch.uint8)], Like((6, 3), torch.int32), 0, 4),
        ("MoeInitRouting", "IndexSelect"),
    ),
    "unpermute": Case(
        "unpermute", (Like((18, 64)), Like((6, 3), torch.float32), Like((6, 3), torch.int64)), ("MoeFinalizeRouting",)
    ),
    "unpermute-shares": Case("unpermute", (Like((18, 64)), None, Like((6, 3), torch.int64)), ("IndexSelect",)),
    "unpermute-few": Case(
        "unpermute", (Like((24, 64)), Like((6, 3), torch.float32), Like((6, 3), torch.int64)), ("IndexSelect",)
    ),
    "linear": Case(
        "grouped_linear", (Like((6, 64)), Like((4,), torch.int64), Like((4, 32, 64)), None), ("GroupedMatmul",)
    ),
    "linear-one": Case(
        "grouped_linear", (Like((6, 64)), Like((1,), torch.int64), Like((1, 32, 64)), None), ("GroupedMatmul",)
    ),
    "linear-bias": Case(
        "grouped_linear",
        (Like((6, 64)), Like((4,), torch.int64), Like((4, 32, 64)), Like((4, 32))),
        ("InplaceCopy", "GroupedMatmul"),
    ),
    "linear-float32": Case(
        "grouped_linear",
        (Like((6, 64), torch.float32), Like((4,), torch.int64), Like((4, 32, 64), torch.float32), None),
        ("GroupedMatmul",),
    ),
    "linear-widened": Case(
        "grouped_linear",
        (Like((6, 64), torch.float32), Like((4,), torch.int64), Like((4, 32, 64), torch.float16), None),
        ("InplaceCopy", "GroupedMatmul", "InplaceCopy"),
    ),
}


def experts_of(form: Form) -> mo.ExpertWeights:
    """Two of them: those of a rank of eight."""
    return make_experts(form, mo.ParallelGroups(ep=Group("", E // 2, 0)), "npu")


def build(argument: Any) -> Any:
    if isinstance(argument, Like):
        return torch.empty(argument.shape, dtype=argument.dtype, device="npu")
    return [build(item) for item in argument] if isinstance(argument, list) else argument


def as_list(results: Any) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else list(results)


def signature(results: Any) -> list[tuple[Any, ...]]:
    return [(tuple(x.shape), x.dtype, x.device.type) for x in as_list(results)]


def assert_in_order(launched: Sequence[str], kernels: Sequence[str]) -> None:
    """Each kernel is one that a launch is named after, in this order."""
    rest = iter(launched)
    for kernel in kernels:
        assert any(kernel in name for name in rest), f"{kernel} of {kernels} is not in {launched}"


def test_every_lowering_has_a_case() -> None:
    assert {case.op for case in CASES.values()} == {name for name, kernels in KERNELS.items() if KEY in kernels}


# On the other chips the portable bodies would cast to fp8 and fp4: whether these have such casts is not known.
LAUNCHED = {name: case for name, case in CASES.items() if IS_A5 or not case.op.startswith("quantize_mx")}


@pytest.mark.parametrize("case", LAUNCHED.values(), ids=LAUNCHED.keys())
def test_the_host_accepts_the_call_and_launches(stand_in: StandIn, case: Case) -> None:
    op = getattr(torch.ops.moe_ops, case.op)
    arguments = [build(argument) for argument in case.arguments]
    results: list[Any] = []
    launched = stand_in.launches_during(lambda: results.append(op(*arguments)))
    assert_in_order(launched, case.kernels)
    with FakeTensorMode():
        expected = op(*[build(argument) for argument in case.arguments])  # the shape function
    assert signature(results[0]) == signature(expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_meta_functions_agree_with_the_shape_function(case: Case) -> None:
    with FakeTensorMode():
        arguments = [build(argument) for argument in case.arguments]
        found = KERNELS[case.op][KEY](*arguments)
        expected = getattr(torch.ops.moe_ops, case.op)(*arguments)
    assert signature(found) == signature(expected)
    assert [x.is_contiguous() for x in as_list(found)] == [True] * len(as_list(found))


EXPERT_KERNELS = {
    "half": (Quant.NONE, False, ("GroupedMatmul", "SwiGlu", "GroupedMatmul")),
    "half-packed": (Quant.NONE, True, ("GroupedMatmul", "SwiGlu", "GroupedMatmul")),
    "w8a8": (Quant.W8A8, False, ("DynamicQuant", "GroupedMatmul", "SwiGlu", "DynamicQuant", "GroupedMatmul")),
    "w8a8-packed": (Quant.W8A8, True, ("DynamicQuant", "GroupedMatmulSwigluQuant", "GroupedMatmul")),
}
if IS_A5:
    del EXPERT_KERNELS["w8a8-packed"]  # weights stay plain there
    EXPERT_KERNELS["mxfp8"] = (Quant.MXFP8, False, ("DynamicMxQuant", "GroupedMatmulSwigluQuant", "GroupedMatmul"))


@pytest.mark.parametrize(("quant", "is_packed", "kernels"), EXPERT_KERNELS.values(), ids=EXPERT_KERNELS.keys())
def test_experts_launch_what_fuses_most(
    stand_in: StandIn, quant: Quant, is_packed: bool, kernels: tuple[str, ...]
) -> None:
    experts = experts_of(Form(MC2, quant=quant, is_packed=is_packed))
    if is_packed:
        assert experts.layout is mo.WeightLayout.NPU
        assert experts.w13.shape == (2, H, 2 * I)
    rows, counts = torch.empty(6, H, dtype=torch.bfloat16).npu(), torch.tensor([4, 2]).npu()
    results: list[torch.Tensor] = []
    launched = stand_in.launches_during(lambda: results.append(run_experts(rows, counts, experts, quant=quant)))
    assert_in_order(launched, kernels)
    assert signature(results[0]) == [((6, H), torch.bfloat16, "npu")]


@pytest.mark.parametrize("quant", [Quant.NONE, Quant.W8A8, *[Quant.MXFP8] * IS_A5])
def test_mc2_launches_both_halves(
    stand_in: StandIn, hccl_groups: Callable[..., dict[int, dist.ProcessGroup]], quant: Quant
) -> None:
    """Eagerly, and the same shapes from the meta functions."""
    ep = Group.from_process_group(hccl_groups(rank=5, sizes=())[8])
    rows, top_k, local = 16, 8, 4

    def exchange() -> tuple[list[Any], torch.Tensor]:
        x = torch.empty(rows, H, dtype=torch.bfloat16, device="npu")
        ids = torch.zeros(rows, top_k, dtype=torch.int32, device="npu")
        weights = torch.zeros(rows, top_k, device="npu")
        received, scale, counts, state = npu_mc2.dispatch(
            x, ids, weights, num_local_experts=local, ep=ep, quant=quant, has_gaps=True, may_repeat=True
        )
        assert (state.expand_scales is not None) == IS_A5
        assert state.expand_scales is None or state.expand_scales.shape == (received.shape[0],)
        y = torch.empty(received.shape, dtype=torch.bfloat16, device="npu")
        parts = [received, counts, *[scale] * (scale is not None)]
        return parts, npu_mc2.combine(y, state, num_local_experts=local, ep=ep)

    results: list[Any] = []
    launched = stand_in.launches_during(lambda: results.append(exchange()))
    assert_in_order(launched, ("MoeDistributeDispatch", "MoeDistributeCombine"))
    parts, output = results[0]
    room = rows * 8 * min(local, top_k)
    dtype = {Quant.NONE: torch.bfloat16, Quant.W8A8: torch.int8, Quant.MXFP8: torch.float8_e4m3fn}[quant]
    expected = [((room, H), dtype, "npu"), ((local,), torch.int64, "npu")]
    if quant is Quant.W8A8:
        expected.append(((room,), torch.float32, "npu"))
    if quant is Quant.MXFP8:
        expected.append(((room, H // 32), torch.float8_e8m0fnu, "npu"))
    assert signature(parts) == expected
    assert signature(output) == [((rows, H), torch.bfloat16, "npu")]
    with FakeTensorMode():
        fake_parts, fake_output = exchange()
    assert signature(fake_parts) == expected and signature(fake_output) == signature(output)


def test_the_seventh_result_of_dispatch_is_used_where_it_is_asked_for() -> None:
    """Without expert_scales its meta function gives it no rows, and the kernel A (a difference of torch_npu 2.13)."""
    with FakeTensorMode():
        x = torch.empty(16, H, dtype=torch.bfloat16, device="npu")
        ids = torch.empty(16, 8, dtype=torch.int32, device="npu")
        assert torch.ops.npu.npu_moe_distribute_dispatch_v2(x, ids, "group", 8, 0, 64)[6].shape == (0,)


def test_packed_weights_serve_their_kernels_alone() -> None:
    experts = experts_of(Form(MC2, is_packed=True))
    rows, counts = torch.empty(6, H, dtype=torch.bfloat16).npu(), torch.tensor([4, 2]).npu()
    with pytest.raises(ValueError, match=r"must have WeightLayout\.PLAIN with Quant\.W8A8, got WeightLayout\.NPU"):
        run_experts(rows, counts, experts, quant=Quant.W8A8)
    again = mo.prepack_experts(experts)
    assert again.w13 is experts.w13
    assert experts_of(Form(MC2, dtype=torch.float32, is_packed=True)).layout is mo.WeightLayout.PLAIN


@pytest.mark.parametrize("what", ["tokens", "weights"])
def test_what_needs_a_gradient_does_not_go_through_mc2(
    stand_in: StandIn, hccl_groups: Callable[..., dict[int, dist.ProcessGroup]], what: str
) -> None:
    """Which has none; the kernels of the ops on this rank run forward as ever, with our backward."""
    hccl_groups(sizes=())
    layer = LAYERS["mc2"]
    stage, inputs = make_stage(layer.form, layer.groups(), "npu"), make_inputs(6)
    if what == "tokens":
        inputs.hidden_states.requires_grad_()
    else:
        inputs.router_logits.requires_grad_()
    outputs: list[torch.Tensor] = []
    launched = stand_in.launches_during(lambda: outputs.append(stage(*inputs)))
    assert outputs[0].requires_grad
    assert not any("MoeDistribute" in name for name in launched)
    local = ("MoeGatingTopK", "MoeInitRouting", "GroupedMatmul", "SwiGlu", "GroupedMatmul", "MoeFinalizeRouting")
    assert_in_order(launched, local)
    with torch.no_grad():
        assert_in_order(stand_in.launches_during(lambda: stage(*inputs)), ("MoeDistributeDispatch",))
