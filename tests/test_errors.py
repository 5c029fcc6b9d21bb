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


def layout_of(strategy: Strategy, sharded: bool, group: str, size: int = W, rank: int = 1) -> mo.Layout:
    """Rank 1 of four: the DP form of ALLGATHER over DP, the others over TP."""
    axis = mo.Group(group, size, rank)
    is_dp = strategy is Strategy.ALLGATHER and not sharded
    groups = mo.ParallelGroups(dp=axis, ep=axis) if is_dp else mo.ParallelGroups(tp=axis, ep=axis)
    return mo.Layout(strategy, groups, tokens_are_sharded=sharded)


LONGEST = mo.Lengths(longest=8)


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


def prepare_with(layout: Any, lengths: Any = LONGEST, quant: Any = mo.Quant.NONE) -> Call:
    return lambda hidden, logits: mo.prepare(hidden, logits, layout, lengths, quant).hidden_states


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
    fake_group4: str,
) -> None:
    function = prepare_with(layout_of(strategy, sharded, fake_group4))
    check_raises(kind, f"prepare: {message}", function, [hidden, logits])


MASK = torch.ones(8, dtype=torch.bool)


@pytest.mark.parametrize(("strategy", "sharded"), FORMS)
@pytest.mark.parametrize(
    ("lengths", "kind", "message"),
    [
        (mo.Lengths(longest=4), ValueError, "rows of hidden_states must be at most lengths.longest = 4, got 5"),
        (mo.Lengths(longest=-1), ValueError, "rows of hidden_states must be at most lengths.longest = -1, got 5"),
        (mo.Lengths(longest=5.0), TypeError, "lengths.longest must be an integer, got 5.0"),
        (
            mo.Lengths(per_rank=[5, 5, 5]),
            ValueError,
            "lengths.per_rank must hold 4 counts, one for each EP rank, got 3",
        ),
        (mo.Lengths(per_rank=[5, 4, 5, 5]), ValueError, "rows of hidden_states must be lengths.per_rank[1] = 4, got 5"),
        (mo.Lengths(per_rank=[-1, 5, 2, 2]), ValueError, "lengths.per_rank must not be negative, got (-1, 5, 2, 2)"),
        (
            mo.Lengths(per_rank=torch.tensor([1, 5, 2, 2])),
            TypeError,
            "lengths.per_rank must be a sequence of integers, got a tensor",
        ),
        (
            mo.Lengths(longest=8, per_rank=[5, 5, 5, 5]),
            ValueError,
            "lengths.longest must be the largest of lengths.per_rank = 5, got 8",
        ),
        (
            mo.Lengths(equal=True, longest=8),
            ValueError,
            "lengths.longest must be rows of hidden_states (lengths.equal) = 5, got 8",
        ),
        (
            mo.Lengths(equal=True, longest=5, per_rank=[5, 5, 5, "5"]),
            TypeError,
            "lengths.per_rank must be a sequence of integers, got [5, 5, 5, '5']",
        ),
        (mo.Lengths(longest=True), TypeError, "lengths.longest must be an integer, got True"),
        (mo.Lengths(equal=1), TypeError, "lengths.equal must be True or False, got 1"),
        (mo.Lengths(mask=[True]), TypeError, "lengths.mask must be a tensor, got list"),
        (mo.Lengths(mask=MASK.view(8, 1)), ValueError, "lengths.mask must be 1-D, got 2-D of shape (8, 1)"),
        (
            mo.Lengths(mask=MASK.float()),
            TypeError,
            "lengths.mask must have one of the dtypes torch.bool, got torch.float32",
        ),
        (5, TypeError, "lengths must be a Lengths, got 5"),
    ],
    ids=str,
)
def test_lengths(
    strategy: Strategy, sharded: bool, lengths: Any, kind: type[Exception], message: str, fake_group4: str
) -> None:
    function = prepare_with(layout_of(strategy, sharded, fake_group4), lengths)
    check_raises(kind, f"prepare: {message}", function, [torch.zeros(T, H), torch.zeros(T, E)])


@pytest.mark.parametrize(("strategy", "sharded"), FORMS)
def test_ragged_lengths_contradict_equal_ones_and_ranks_of_a_tp_group(
    strategy: Strategy, sharded: bool, fake_group4: str
) -> None:
    layout, tensors = layout_of(strategy, sharded, fake_group4), [torch.zeros(T, H), torch.zeros(T, E)]
    is_whole = layout.groups.tp.size > 1 and not sharded
    message = "lengths.per_rank must repeat a number for the ranks of a TP group, got (5, 5, 4, 5)"
    if is_whole:
        check_raises(ValueError, message, prepare_with(layout, mo.Lengths(per_rank=[5, 5, 4, 5])), tensors)
    else:
        message = "lengths.per_rank[2] must be rows of hidden_states (lengths.equal) = 5, got 4"
    check_raises(ValueError, message, prepare_with(layout, mo.Lengths(equal=True, per_rank=[5, 5, 4, 5])), tensors)


@pytest.mark.parametrize(
    ("strategy", "sharded", "rows", "more", "message"),
    [
        (
            Strategy.ALL2ALL,
            False,
            10,
            {},
            "rows of lengths.mask must be a multiple of the size of the TP group = 4, got 10",
        ),
        (Strategy.ALL2ALL, False, 4, {}, "rows of hidden_states must be at most rows of lengths.mask = 4, got 5"),
        (Strategy.MC2, False, 4, {}, "rows of hidden_states must be at most rows of lengths.mask = 4, got 5"),
        (Strategy.ALLGATHER, False, 4, {}, "rows of hidden_states must be at most rows of lengths.mask = 4, got 5"),
        (Strategy.MC2, False, 8, {"longest": 9}, "lengths.longest must be at most rows of lengths.mask = 8, got 9"),
        (
            Strategy.ALLGATHER,
            True,
            16,
            {},
            "rows of hidden_states must be at most rows of lengths.mask / TP = 4, got 5",
        ),
        (
            Strategy.MC2,
            True,
            20,
            {"per_rank": [1, 5, 6, 2]},
            "lengths.longest must be at most rows of lengths.mask / TP = 5, got 6",
        ),
    ],
)
def test_masks(
    strategy: Strategy, sharded: bool, rows: int, more: dict[str, Any], message: str, fake_group4: str
) -> None:
    layout = layout_of(strategy, sharded, fake_group4)

    def function(hidden: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mo.prepare(hidden, logits, layout, mo.Lengths(mask=mask, **more)).hidden_states

    mask = torch.ones(rows, dtype=torch.bool)
    check_raises(ValueError, f"prepare: {message}", function, [torch.zeros(T, H), torch.zeros(T, E), mask])


@pytest.mark.parametrize(("strategy", "sharded"), FORMS[1:])
def test_a_form_that_needs_lengths_says_so(strategy: Strategy, sharded: bool, fake_group4: str) -> None:
    layout, form = layout_of(strategy, sharded, fake_group4), strategy.name
    message = "lengths must say how many tokens other ranks have (longest, equal, per_rank or mask) for"
    function = prepare_with(layout, mo.Lengths())
    check_raises(ValueError, f"prepare: {message} {form}", function, [torch.zeros(T, H), torch.zeros(T, E)])


def test_other_arguments_of_another_kind(fake_group4: str) -> None:
    tensors, layout = [torch.zeros(T, H), torch.zeros(T, E)], layout_of(Strategy.ALLGATHER, True, fake_group4)
    wrong = layout._replace(strategy="allgather")
    for function, message in (
        (prepare_with(Strategy.ALLGATHER), "prepare: layout must be a Layout, got <Strategy.ALLGATHER: 'allgather'>"),
        (prepare_with(wrong), "prepare: layout.strategy must be a Strategy, got 'allgather'"),
        (prepare_with(layout, quant="int8"), "prepare: quant must be a Quant, got 'int8'"),
    ):
        with pytest.raises(TypeError) as error:
            function(*tensors)
        assert message in str(error.value)


@pytest.mark.parametrize(("strategy", "sharded"), FORMS[:3])
def test_prepare_refuses_to_quantise_where_dispatch_does(strategy: Strategy, sharded: bool, fake_group4: str) -> None:
    function = prepare_with(layout_of(strategy, sharded, fake_group4), quant=mo.Quant.W8A8)
    with pytest.raises(ValueError, match=r"prepare: quant must be NONE for .*, got Quant\.W8A8"):
        function(torch.zeros(T, H), torch.zeros(T, E))


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
    function = prepare_with(layout_of(strategy, sharded, name or fake_group4, size))
    check_raises(kind, message, function, [torch.zeros(T, H), torch.zeros(T, E)])


@pytest.mark.parametrize(("strategy", "sharded"), FORMS)
def test_finalize_takes_the_rows_that_prepare_returned(strategy: Strategy, sharded: bool, fake_group4: str) -> None:
    layout = layout_of(strategy, sharded, fake_group4)
    out = mo.prepare(torch.zeros(T, H), torch.zeros(T, E), layout, LONGEST)
    rows = out.hidden_states.shape[0]

    def function(y: torch.Tensor) -> torch.Tensor:
        return mo.finalize(y, out.state, layout)

    message = f"finalize: rows of hidden_states must be the rows that prepare returned = {rows}, got {rows + 1}"
    check_raises(ValueError, message, function, [torch.zeros(rows + 1, H)])
    check_raises(ValueError, "finalize: hidden_states must be 2-D, got 1-D", function, [torch.zeros(rows)])


def test_finalize_takes_the_state_of_its_form(fake_group4: str) -> None:
    x, logits = torch.zeros(T, H), torch.zeros(T, E)
    layouts = [layout_of(*form, fake_group4) for form in FORMS]
    states = [mo.prepare(x, logits, layout, LONGEST).state for layout in layouts]
    for layout, state in ((layout, state) for layout in layouts for state in states):
        of_exchange = layout.strategy is not Strategy.ALLGATHER
        wanted = (mo.types.ShardState, mo.types.ExpertParallelState, mo.types.DataParallelState)
        kind = wanted[0 if of_exchange else 1 if layout.tokens_are_sharded else 2]
        if isinstance(state, kind):
            continue
        for step in (mo.finalize, mo.lay_out_like_prepared):
            tensor = x if step is mo.finalize else torch.zeros(T, dtype=torch.int64)
            with pytest.raises(TypeError, match=f"state must be that of an .* prepare.*, got {type(state).__name__}"):
                step(tensor, state, layout)


@pytest.mark.parametrize(("strategy", "sharded"), FORMS)
def test_lay_out_takes_integers_of_the_tokens(strategy: Strategy, sharded: bool, fake_group4: str) -> None:
    layout = layout_of(strategy, sharded, fake_group4)
    state = mo.prepare(torch.zeros(T, H), torch.zeros(T, E), layout, LONGEST).state
    with pytest.raises(ValueError, match=r"rows of x must be state\.num_tokens = 5, got 4"):
        mo.lay_out_like_prepared(torch.zeros(4, dtype=torch.int64), state, layout)
    with pytest.raises(TypeError, match=r"x must have one of the dtypes torch\.int64.*, got torch\.float32"):
        mo.lay_out_like_prepared(torch.zeros(T), state, layout)
    with pytest.raises(ValueError, match="x must have at least 1 dimension, got 0-D"):
        mo.lay_out_like_prepared(torch.tensor(1), state, layout)


def test_compiled_code_refuses_a_count_that_it_was_not_traced_with(fake_group4: str) -> None:
    """The graph knows no token count: torch checks at run time what the ops demand, in words of its own."""
    function = prepare_with(layout_of(Strategy.MC2, False, fake_group4))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)

    def call(num_tokens: int) -> torch.Tensor:
        tensors = torch.zeros(num_tokens, H), torch.zeros(num_tokens, E)
        mo.mark_token_axes(*tensors)
        return compiled(*tensors)

    assert call(8).shape == (2, H)
    with pytest.raises(Exception, match=r"hidden\.size\(\)\[0\] <= 8"):
        call(9)


def test_ranks_are_those_of_the_group(fake_group4: str) -> None:
    x, logits = torch.zeros(T, H), torch.zeros(T, E)
    for rank in (-1, W):
        for strategy in (Strategy.ALL2ALL, Strategy.MC2):
            with pytest.raises(ValueError, match=rf"rank must be in \[0, 4\), got {rank}"):
                prepare_with(layout_of(strategy, False, fake_group4, rank=rank))(x, logits)
    layout = mo.Layout(Strategy.ALLGATHER, mo.ParallelGroups(tp=mo.Group(fake_group4, W, 1)))
    state = mo.prepare(x, logits, layout).state
    wrong = layout._replace(groups=mo.ParallelGroups(tp=mo.Group(fake_group4, 3, 1)))
    with pytest.raises(ValueError, match=r"finalize: tp group '.*' must have size 4, that of its process group, got 3"):
        mo.finalize(x, state, wrong, reduce_results=True)


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: s.value)
def test_scalars_are_refused(strategy: Strategy) -> None:
    scalar, layout = torch.tensor(1.0), mo.Layout(strategy, mo.ParallelGroups())
    with pytest.raises(ValueError, match="hidden_states must be 2-D, got 0-D"):
        mo.prepare(scalar, torch.zeros(1, E), layout)
    with pytest.raises(ValueError, match=r"lengths\.mask must be 1-D, got 0-D"):
        mo.prepare(torch.zeros(1, H), torch.zeros(1, E), layout, mo.Lengths(mask=scalar.bool()))
    state = mo.prepare(torch.zeros(1, H), torch.zeros(1, E), layout).state
    with pytest.raises(ValueError, match="hidden_states must be 2-D, got 0-D"):
        mo.finalize(scalar, state, layout)


def test_counts_of_tokens_are_not_negative() -> None:
    with pytest.raises(ValueError, match="num_tokens must not be negative, got -1"):
        mo.token_count(-1)
