"""Bad input: one message that names the argument, what it must be and what it got; eager, on fakes and compiled alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch._subclasses import FakeTensorMode

import moe_ops as mo
from moe_ops import Strategy

T, H, E, W = 5, 4, 6, 4
ALL = list(Strategy)
FORMS = [(Strategy.ALL2ALL, False), (Strategy.MC2, False), (Strategy.ALLGATHER, False), (Strategy.ALLGATHER, True)]
Call = Callable[..., Any]


@pytest.fixture
def groups(fake_group4: str) -> mo.ParallelGroups:
    group = mo.Group(fake_group4, W, 1)
    return mo.ParallelGroups(tp=group, dp=group, ep=group)


def keywords(strategy: Strategy, sharded: bool, groups: mo.ParallelGroups) -> dict[str, Any]:
    valid: dict[str, Any] = {"strategy": strategy, "tokens_are_sharded": sharded, "groups": groups}
    return valid | {"padded_num_tokens": 8, "max_tokens_across_dp": 8, "num_tokens_across_ep": [2, T, 0, 1]}


def check_raises(kind: type[Exception], message: str, function: Call, tensors: list[torch.Tensor]) -> None:
    """The error is raised eagerly with its own type; a compiler wraps it and keeps the message."""
    with pytest.raises(kind) as error:
        function(*tensors)
    assert message in str(error.value)
    with FakeTensorMode() as mode, pytest.raises(kind) as error:
        function(*pytree.tree_map(mode.from_tensor, tensors))
    assert message in str(error.value)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception) as error:  # noqa: PT011
        compiled(*tensors)
    assert message in str(error.value)


def prepare_with(**changed: Any) -> Call:
    return lambda hidden, logits, **tensors: mo.prepare(hidden, logits, **changed, **tensors).hidden_states


@pytest.mark.parametrize(("strategy", "sharded"), FORMS)
@pytest.mark.parametrize(
    ("kind", "hidden", "logits", "message"),
    [
        (ValueError, torch.zeros(T), torch.zeros(T, E), "hidden_states must be 2-D, got 1-D of shape (5,)"),
        (ValueError, torch.zeros(T, 1, H), torch.zeros(T, E), "hidden_states must be 2-D, got 3-D of shape (5, 1, 4)"),
        (ValueError, torch.zeros(T, H), torch.zeros(T), "router_logits must be 2-D, got 1-D of shape (5,)"),
        (
            ValueError,
            torch.zeros(T, H),
            torch.zeros(T - 1, E),
            "rows of router_logits must be those of hidden_states = 5, got 4",
        ),
        (
            TypeError,
            torch.zeros(T, H, dtype=torch.int64),
            torch.zeros(T, E),
            "hidden_states must have a floating-point dtype, got torch.int64",
        ),
        (
            TypeError,
            torch.zeros(T, H),
            torch.zeros(T, E, dtype=torch.bool),
            "router_logits must have a floating-point dtype, got torch.bool",
        ),
    ],
)
def test_tensors(
    strategy: Strategy,
    sharded: bool,
    kind: type[Exception],
    hidden: torch.Tensor,
    logits: torch.Tensor,
    message: str,
    groups: mo.ParallelGroups,
) -> None:
    function = prepare_with(**keywords(strategy, sharded, groups))
    check_raises(kind, f"prepare: {message}", function, [hidden, logits])


@pytest.mark.parametrize(
    ("strategy", "sharded", "changed", "kind", "message"),
    [
        (
            Strategy.MC2,
            False,
            {"padded_num_tokens": 4},
            ValueError,
            "rows of hidden_states must be at most padded_num_tokens = 4, got 5",
        ),
        (
            Strategy.MC2,
            True,
            {"padded_num_tokens": 16},
            ValueError,
            "rows of hidden_states must be at most padded_num_tokens = 4, got 5",
        ),
        (
            Strategy.MC2,
            False,
            {"padded_num_tokens": 10},
            ValueError,
            "padded_num_tokens must be a multiple of the size of the TP group = 4, got 10",
        ),
        (
            Strategy.MC2,
            False,
            {"padded_num_tokens": None},
            ValueError,
            "MC2 needs padded_num_tokens or mc2_mask, got None for both",
        ),
        (
            Strategy.ALLGATHER,
            False,
            {"max_tokens_across_dp": 4},
            ValueError,
            "rows of hidden_states must be at most max_tokens_across_dp = 4, got 5",
        ),
        (
            Strategy.ALLGATHER,
            True,
            {"num_tokens_across_ep": [1, 2, 5]},
            ValueError,
            "num_tokens_across_ep must hold 4 counts, one for each EP rank, got 3",
        ),
        (
            Strategy.ALLGATHER,
            True,
            {"num_tokens_across_ep": [5, 4, 5, 5]},
            ValueError,
            "rows of hidden_states must be num_tokens_across_ep[1] = 4, got 5",
        ),
        (
            Strategy.ALLGATHER,
            False,
            {"strategy": "allgather"},
            TypeError,
            "strategy must be a Strategy, got 'allgather'",
        ),
        (Strategy.ALLGATHER, False, {"quant": "int8"}, TypeError, "quant must be a Quant, got 'int8'"),
    ],
)
def test_counts(
    strategy: Strategy,
    sharded: bool,
    changed: dict[str, Any],
    kind: type[Exception],
    message: str,
    groups: mo.ParallelGroups,
) -> None:
    function = prepare_with(**(keywords(strategy, sharded, groups) | changed))
    check_raises(kind, f"prepare: {message}", function, [torch.zeros(T, H), torch.zeros(T, E)])


def test_tokens_beyond_the_pcp_length(fake_group4: str) -> None:
    groups = mo.ParallelGroups(pcp=mo.Group(fake_group4, W, 1))
    function = prepare_with(strategy=Strategy.ALLGATHER, groups=groups, max_tokens_across_pcp=4)
    message = "prepare: rows before the PCP gather must be at most max_tokens_across_pcp = 4, got 5"
    check_raises(ValueError, message, function, [torch.zeros(T, H), torch.zeros(T, E)])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("shared_expert_dp", [False, True])
@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (torch.ones(12, dtype=torch.bool), ValueError, "rows of mc2_mask must be padded_num_tokens = 20, got 12"),
        (torch.ones(20, 1, dtype=torch.bool), ValueError, "mc2_mask must be 1-D, got 2-D of shape (20, 1)"),
        (torch.ones(20), TypeError, "mc2_mask must have one of the dtypes torch.bool, got torch.float32"),
    ],
    ids=["length", "dimensions", "dtype"],
)
def test_masks(
    sharded: bool,
    shared_expert_dp: bool,
    mask: torch.Tensor,
    kind: type[Exception],
    message: str,
    groups: mo.ParallelGroups,
) -> None:
    def function(hidden: torch.Tensor, logits: torch.Tensor, mc2_mask: torch.Tensor) -> torch.Tensor:
        return mo.prepare(
            hidden,
            logits,
            strategy=Strategy.MC2,
            groups=groups,
            padded_num_tokens=20,
            mc2_mask=mc2_mask,
            tokens_are_sharded=sharded,
            shared_expert_dp=shared_expert_dp,
        ).hidden_states

    check_raises(kind, f"prepare: {message}", function, [torch.zeros(T, H), torch.zeros(T, E), mask])


@pytest.mark.parametrize(("strategy", "sharded"), FORMS)
@pytest.mark.parametrize(
    ("name", "size", "kind", "message"),
    [
        (None, 3, ValueError, "must have size 4, that of its process group, got 3"),
        ("gone", 4, RuntimeError, "group must name an initialised process group, got 'gone' of 4 ranks"),
    ],
    ids=["size", "uninitialised"],
)
def test_groups(
    strategy: Strategy,
    sharded: bool,
    name: str | None,
    size: int,
    kind: type[Exception],
    message: str,
    fake_group4: str,
) -> None:
    group = mo.Group(name or fake_group4, size, 1)
    groups = mo.ParallelGroups(tp=group, dp=group, ep=group)
    changed = {"padded_num_tokens": 12, "num_tokens_across_ep": None}
    function = prepare_with(**(keywords(strategy, sharded, groups) | changed))
    check_raises(kind, message, function, [torch.zeros(T, H), torch.zeros(T, E)])


@pytest.mark.parametrize(("strategy", "sharded"), FORMS)
def test_finalize_takes_the_rows_that_prepare_returned(
    strategy: Strategy, sharded: bool, groups: mo.ParallelGroups
) -> None:
    out = mo.prepare(torch.zeros(T, H), torch.zeros(T, E), **keywords(strategy, sharded, groups))
    rows = out.hidden_states.shape[0]

    def function(y: torch.Tensor) -> torch.Tensor:
        return mo.finalize(y, out.state, strategy=strategy, groups=groups)

    message = f"finalize: rows of hidden_states must be the rows that prepare returned = {rows}, got {rows + 1}"
    check_raises(ValueError, message, function, [torch.zeros(rows + 1, H)])
    check_raises(ValueError, "finalize: hidden_states must be 2-D, got 1-D", function, [torch.zeros(rows)])


def test_finalize_takes_the_state_of_its_strategy(groups: mo.ParallelGroups) -> None:
    x, logits = torch.zeros(T, H), torch.zeros(T, E)
    chunk = mo.prepare(x, logits, **keywords(Strategy.ALL2ALL, False, groups)).state
    gathered = mo.prepare(x, logits, **keywords(Strategy.ALLGATHER, False, groups)).state
    with pytest.raises(TypeError, match="state must be that of an ALLGATHER prepare, got ShardState"):
        mo.finalize(x, chunk, strategy=Strategy.ALLGATHER, groups=groups)
    for strategy in (Strategy.ALL2ALL, Strategy.MC2):
        with pytest.raises(TypeError, match="state must be that of an ALL2ALL or MC2 prepare, got DataParallelState"):
            mo.finalize(x, gathered, strategy=strategy, groups=groups)


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: s.value)
def test_lay_out_takes_integers_of_the_tokens(strategy: Strategy, groups: mo.ParallelGroups) -> None:
    state = mo.prepare(torch.zeros(T, H), torch.zeros(T, E), **keywords(strategy, False, groups)).state
    with pytest.raises(ValueError, match=r"rows of input_ids must be state\.num_tokens = 5, got 4"):
        mo.lay_out_like_prepared(torch.zeros(4, dtype=torch.int64), state, strategy=strategy, groups=groups)
    with pytest.raises(TypeError, match=r"input_ids must have one of the dtypes torch\.int64.*, got torch\.float32"):
        mo.lay_out_like_prepared(torch.zeros(T), state, strategy=strategy, groups=groups)


def test_compiled_code_refuses_a_count_that_it_was_not_traced_with(groups: mo.ParallelGroups) -> None:
    """The graph knows no token count: torch checks at run time what the ops demand, in words of its own."""
    compiled = torch.compile(prepare_with(**keywords(Strategy.MC2, False, groups)), backend="aot_eager", fullgraph=True)

    def call(num_tokens: int) -> torch.Tensor:
        tensors = torch.zeros(num_tokens, H), torch.zeros(num_tokens, E)
        mo.mark_token_axes(*tensors)
        return compiled(*tensors)

    assert call(8).shape == (2, H)
    with pytest.raises(Exception, match=r"hidden\.size\(\)\[0\] <= 8"):
        call(9)


def test_more_arguments_that_are_refused(groups: mo.ParallelGroups) -> None:
    x, logits = torch.zeros(T, H), torch.zeros(T, E)
    with pytest.raises(ValueError, match=r"num_tokens_across_ep must not be negative, got \(-1, 5, 2, 2\)"):
        prepare_with(**(keywords(Strategy.ALLGATHER, True, groups) | {"num_tokens_across_ep": [-1, T, 2, 2]}))(
            x, logits
        )
    counts = keywords(Strategy.ALLGATHER, True, groups) | {"num_tokens_across_ep": torch.tensor([1, T, 2, 2])}
    with pytest.raises(TypeError, match="num_tokens_across_ep must be a sequence of integers, got a tensor"):
        prepare_with(**counts)(x, logits)
    for rank in (-1, W):
        wrong = groups._replace(tp=groups.tp._replace(rank=rank), ep=groups.ep._replace(rank=rank))
        for strategy, sharded in ((Strategy.ALL2ALL, False), (Strategy.MC2, False), (Strategy.ALLGATHER, True)):
            with pytest.raises(ValueError, match=rf"rank must be in \[0, 4\), got {rank}"):
                prepare_with(
                    **(keywords(strategy, sharded, wrong) | {"num_tokens_across_ep": None}),
                )(x, logits)
    state = mo.prepare(x, logits, strategy=Strategy.ALLGATHER, groups=mo.ParallelGroups(tp=groups.tp)).state
    wrong = mo.ParallelGroups(tp=groups.tp._replace(size=3))
    with pytest.raises(ValueError, match=r"finalize: tp group '.*' must have size 4, that of its process group, got 3"):
        mo.finalize(x, state, strategy=Strategy.ALLGATHER, groups=wrong, reduce_results=True)
    with pytest.raises(ValueError, match="input_ids must have at least 1 dimension, got 0-D"):
        mo.lay_out_like_prepared(torch.tensor(1), state, strategy=Strategy.ALLGATHER, groups=groups)


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: s.value)
def test_scalars_are_refused(strategy: Strategy) -> None:
    scalar, groups = torch.tensor(1.0), mo.ParallelGroups()
    with pytest.raises(ValueError, match="hidden_states must be 2-D, got 0-D"):
        mo.prepare(scalar, torch.zeros(1, E), strategy=strategy, groups=groups, mc2_mask=torch.ones(1).bool())
    if strategy is Strategy.MC2:
        with pytest.raises(ValueError, match="mc2_mask must be 1-D, got 0-D"):
            mo.prepare(torch.zeros(1, H), torch.zeros(1, E), strategy=strategy, groups=groups, mc2_mask=scalar.bool())
    state = mo.prepare(
        torch.zeros(1, H), torch.zeros(1, E), strategy=strategy, groups=groups, padded_num_tokens=1
    ).state
    with pytest.raises(ValueError, match="hidden_states must be 2-D, got 0-D"):
        mo.finalize(scalar, state, strategy=strategy, groups=groups)


def test_counts_of_tokens_are_not_negative() -> None:
    with pytest.raises(ValueError, match="num_tokens must not be negative, got -1"):
        mo.token_count(-1)
