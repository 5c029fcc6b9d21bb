"""Local dispatch: every row is here already; each rank groups those of its own experts.

N rows, K top-k, H hidden, E experts of this rank, R = N * K rows for the experts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fake_impls.dispatchers import local as shapes
from moe_ops._library import add_kernel, cast, define, no_gradient, refuse_forward_mode


class LocalState(NamedTuple):
    """What combine needs of dispatch.

    Attributes:
        topk_weights: float32 ``[N, K]``.
        positions: int64 ``[N, K]``, where the row of each choice went; -1 where its expert is not here.
    """

    topk_weights: torch.Tensor
    positions: torch.Tensor


class LocalDispatch(NamedTuple):
    """Rows grouped by local expert.

    Attributes:
        rows: ``[R, H]``; the first ``counts.sum()`` are those of this rank's experts, in the order of the experts and, for
            each, in the order in which they came.
        scale: the scales of quantised rows, or None.
        counts: int64 ``[E]``, rows of each local expert, on the device.
        state: for `combine_local`.
    """

    rows: torch.Tensor
    scale: torch.Tensor | None
    counts: torch.Tensor
    state: LocalState


def _permute(
    tensors: Sequence[torch.Tensor], topk_ids: torch.Tensor, first_expert: int, num_local_experts: int
) -> list[torch.Tensor]:
    rows_R, counts, positions = _order(tensors, topk_ids, first_expert, num_local_experts)
    return [*(tensor.index_select(0, rows_R) for tensor in tensors), counts, positions]


def _permute_on_host(
    tensors: Sequence[torch.Tensor], topk_ids: torch.Tensor, first_expert: int, num_local_experts: int
) -> list[torch.Tensor]:
    """On a CPU the counts can be read for nothing, and rows of other ranks' experts need not be copied."""
    rows_R, counts, positions = _order(tensors, topk_ids, first_expert, num_local_experts)
    num_local, num_all = int(counts.sum()), rows_R.shape[0]
    permuted = [tensor.new_empty(num_all, *tensor.shape[1:]) for tensor in tensors]
    for tensor, result in zip(tensors, permuted, strict=True):
        torch.index_select(tensor, 0, rows_R[:num_local], out=result.narrow(0, 0, num_local))
        result.narrow(0, num_local, num_all - num_local).view(torch.uint8).zero_()  # some dtypes have no fill
    return [*permuted, counts, positions]


def _order(
    tensors: Sequence[torch.Tensor], topk_ids: torch.Tensor, first_expert: int, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The row of each place, rows of each local expert, and the place of each choice."""
    num_rows, top_k = topk_ids.shape
    local_R = topk_ids.to(torch.int64).flatten() - first_expert
    is_local_R = (local_R >= 0) & (local_R < num_local_experts)  # -1 is below any first expert
    group_R = torch.where(is_local_R, local_R, num_local_experts)  # the last group: experts of other ranks, id -1
    order_R = torch.argsort(group_R, stable=True)
    counts = group_R.new_zeros(num_local_experts + 1).scatter_add(0, group_R, torch.ones_like(group_R))
    place_R = torch.arange(order_R.shape[0], device=order_R.device)
    positions_R = torch.zeros_like(order_R).scatter(0, order_R, place_R)
    positions = torch.where(is_local_R, positions_R, -1).view(num_rows, top_k)
    return order_R // top_k, counts[:num_local_experts].clone(), positions


def _unpermute(rows: torch.Tensor, weights: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
    total_NH = rows.new_zeros(positions.shape[0], rows.shape[1], dtype=torch.float32)
    if not rows.shape[0]:
        return total_NH.to(rows.dtype)
    for choice, positions_N in enumerate(positions.unbind(1)):  # one fixed order
        rows_NH = rows.index_select(0, positions_N.clamp(min=0)).to(torch.float32)
        if weights is not None:
            rows_NH = rows_NH * weights[:, choice].unsqueeze(1)
        total_NH = total_NH + torch.where(positions_N.unsqueeze(1) >= 0, rows_NH, 0.0)  # other rows may hold NaN
    return total_NH.to(rows.dtype)


def _unpermute_on_host(rows: torch.Tensor, weights: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
    """The same sums in the same order. On a CPU reading positions waits for nothing, so only rows of choices are read."""
    total_NH = rows.new_zeros(positions.shape[0], rows.shape[1], dtype=torch.float32)
    if not rows.shape[0]:
        return total_NH.to(rows.dtype)
    for choice, positions_N in enumerate(positions.unbind(1)):
        is_there_N = positions_N >= 0
        is_whole = bool(is_there_N.all())
        chosen = positions_N if is_whole else positions_N[is_there_N]
        rows_CH = rows.index_select(0, chosen).to(torch.float32)
        if weights is not None:
            weights_N = weights[:, choice]
            rows_CH *= (weights_N if is_whole else weights_N[is_there_N]).unsqueeze(1)
        if is_whole:
            total_NH += rows_CH
        else:
            total_NH.index_add_(0, is_there_N.nonzero().squeeze(1), rows_CH)
    return total_NH.to(rows.dtype)


def _weigh_rows(rows: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    zeros_R = weights.new_zeros(rows.shape[0] + 1)  # one more, for choices that went nowhere
    places_R = torch.where(positions >= 0, positions, rows.shape[0]).flatten()
    weights_R = zeros_R.scatter(0, places_R, weights.flatten())
    weighed_RH = rows.to(torch.float32) * weights_R[:-1].unsqueeze(1)
    return cast(weighed_RH, rows.dtype)


def sources(positions: torch.Tensor, rows: int) -> torch.Tensor:
    """int64 ``[N, K] -> [rows]``: the row that went to each place, N where none did: the inverse of `positions`."""
    num_rows = positions.shape[0]
    nowhere_R = positions.new_full((rows + 1,), num_rows)  # one place more, for what went nowhere
    row_NK = torch.arange(num_rows, device=positions.device).unsqueeze(1).expand_as(positions)
    return nowhere_R.scatter(0, torch.where(positions >= 0, positions, rows).flatten(), row_NK.flatten())[:rows]


def _spread_rows(x: torch.Tensor, positions: torch.Tensor, rows: int) -> torch.Tensor:
    num_rows = x.shape[0]
    if not num_rows:
        return x.new_zeros(rows, x.shape[1])
    source_R = sources(positions, rows)
    is_filled_R1 = (source_R < num_rows).unsqueeze(1)
    return torch.where(is_filled_R1, x.index_select(0, source_R.clamp(max=num_rows - 1)), 0)


def _dot_rows(a: torch.Tensor, b: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    if not a.shape[0]:
        return a.new_zeros(positions.shape, dtype=torch.float32)
    dots_R = (a.to(torch.float32) * b.to(torch.float32)).sum(dim=1)
    return torch.where(positions >= 0, dots_R[positions.clamp(min=0)], 0.0).contiguous()


def _used(positions: torch.Tensor) -> int:
    """On a CPU: how many rows have to be computed: no choice went to those after them."""
    return int(positions.max()) + 1 if positions.numel() else 0


def _pad(x: torch.Tensor, rows: int) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, rows - x.shape[0])) if rows > x.shape[0] else x


def _weigh_rows_on_host(rows: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return _pad(_weigh_rows(rows[: _used(positions)], weights, positions), rows.shape[0])


def _spread_rows_on_host(x: torch.Tensor, positions: torch.Tensor, rows: int) -> torch.Tensor:
    return _pad(_spread_rows(x, positions, _used(positions)), rows)


def _dot_rows_on_host(a: torch.Tensor, b: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    end = _used(positions)
    return _dot_rows(a[:end], b[:end], positions)


def _keep_permutation(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    ctx.save_for_backward(output[-1])
    ctx.mark_non_differentiable(*(x for x in output if not x.is_floating_point()))


def _as_matrix(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def _permute_backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    (positions,) = ctx.saved_tensors
    summed = [
        unpermute(_as_matrix(grad), None, positions).view(positions.shape[0], *grad.shape[1:]) for grad in grads[:-2]
    ]
    return summed, None, None, None


def _keep_weighed(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _unpermute_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, weights, positions = ctx.saved_tensors
    grad_RH = spread_rows(grad, positions, rows.shape[0])
    if weights is None:
        return grad_RH, None, None
    grad_weights = dot_rows(grad_RH, rows, positions) if ctx.needs_input_grad[1] else None
    return weigh_rows(grad_RH, weights, positions), grad_weights, None


def _weigh_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, weights, positions = ctx.saved_tensors
    grad_weights = dot_rows(grad, rows, positions) if ctx.needs_input_grad[1] else None
    return weigh_rows(grad, weights, positions), grad_weights, None


permute_by_expert = define(
    # One flat list, because torch's simulation of several ranks takes no list within a tuple.
    "permute_by_expert(Tensor[] tensors, Tensor topk_ids, SymInt first_expert, int num_local_experts) -> Tensor[]",
    kernel=_permute,
    fake=shapes.permute_by_expert,
    check=shapes.check_permute_by_expert,
    backward=_permute_backward,
    setup_context=_keep_permutation,
)
unpermute = define(
    "unpermute(Tensor rows, Tensor? weights, Tensor positions) -> Tensor",
    kernel=_unpermute,
    fake=shapes.unpermute,
    check=shapes.check_unpermute,
    backward=_unpermute_backward,
    setup_context=_keep_weighed,
)
weigh_rows = define(
    "weigh_rows(Tensor rows, Tensor weights, Tensor positions) -> Tensor",
    kernel=_weigh_rows,
    fake=shapes.weigh_rows,
    check=shapes.check_unpermute,
    backward=_weigh_backward,
    setup_context=_keep_weighed,
)
spread_rows = define(
    "spread_rows(Tensor x, Tensor positions, SymInt rows) -> Tensor",
    kernel=_spread_rows,
    fake=shapes.spread_rows,
    check=shapes.check_spread_rows,
    backward=no_gradient,
)
dot_rows = define(
    "dot_rows(Tensor a, Tensor b, Tensor positions) -> Tensor",
    kernel=_dot_rows,
    fake=shapes.dot_rows,
    check=shapes.check_dot_rows,
    backward=no_gradient,
)

for _name, _kernel in (
    ("permute_by_expert", _permute_on_host),
    ("unpermute", _unpermute_on_host),
    ("weigh_rows", _weigh_rows_on_host),
    ("spread_rows", _spread_rows_on_host),
    ("dot_rows", _dot_rows_on_host),
):
    add_kernel(_name, _kernel, "CPU")


def dispatch_local(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    first_expert: int,
    num_local_experts: int,
    scale: torch.Tensor | None = None,
) -> LocalDispatch:
    """Group the rows of this rank's experts, one copy for each choice. Static shapes, no collective, no host sync.

    (The kernels for CPU tensors, of this op and of the others here, read counts and positions, where that waits for nothing.)

    Args:
        hidden_states: ``[N, H]``, quantised or not.
        topk_ids: int32 or int64 ``[N, K]``, ids of the whole layer; -1, and ids of other ranks' experts, go nowhere.
        topk_weights: float32 ``[N, K]``.
        first_expert: id of this rank's first expert.
        num_local_experts: experts of this rank.
        scale: the scales of quantised hidden states.

    Example::

        dispatched = dispatch_local(x, topk_ids, topk_weights, first_expert=0, num_local_experts=8)
        rows = run_experts(dispatched.rows, dispatched.counts, experts, is_summand=True)
    """
    refuse_forward_mode("dispatch", (hidden_states, topk_weights))
    tensors = [hidden_states] if scale is None else [hidden_states, scale]
    rows, *scales, counts, positions = permute_by_expert(tensors, topk_ids, first_expert, num_local_experts)
    return LocalDispatch(rows, scales[0] if scales else None, counts, LocalState(topk_weights, positions))


def weigh_input(rows: torch.Tensor, state: LocalState) -> torch.Tensor:
    """The rows of a dispatch, each times the router's weight: then `combine_local` must not weigh again.

    Example::

        x = weigh_input(dispatched.rows, dispatched.state)
        y = combine_local(run_experts(x, dispatched.counts, experts), dispatched.state, weights_on_input=True)
    """
    refuse_forward_mode("weigh_input", (rows, state))
    weighed: torch.Tensor = weigh_rows(rows, state.topk_weights, state.positions)
    return weighed


def combine_local(expert_rows: torch.Tensor, state: LocalState, *, weights_on_input: bool = False) -> torch.Tensor:
    """Sum each row's results, weighted, in float32 and in the order of its choices. No collective.

    Args:
        expert_rows: ``[R, H]``, what the experts made of the rows of the dispatch.
        state: that of the dispatch.
        weights_on_input: whether the weights went into the experts' input already.

    Returns:
        ``[N, H]`` of the dtype of `expert_rows`: the share of this rank's experts, zero for rows that have none here.

    Example::

        y = combine_local(run_experts(dispatched.rows, dispatched.counts, experts), dispatched.state)
    """
    refuse_forward_mode("combine", (expert_rows, state))
    output: torch.Tensor = unpermute(expert_rows, None if weights_on_input else state.topk_weights, state.positions)
    return output
