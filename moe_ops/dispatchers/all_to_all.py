"""Even all-to-all: every rank sends each of its rows, with ids and weights, to every rank of EP.

All ranks pad to a common number of rows, so the exchange is even and static: capturable, no host sync, nothing dropped. On
the wire it is no smaller than an all-gather. N rows of this rank, R common rows, W ranks of EP, K top-k, H hidden.
"""

import torch

from fake_impls.dispatchers import all_to_all as shapes
from moe_ops._library import define
from moe_ops.collectives import all_to_all, pack_rows, unpack_rows
from moe_ops.groups import Group, check_group


def _dispatch(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, rows: int, group: str, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_group("dispatch", "ep", group, size)
    shapes.check_dispatch(hidden_states, topk_ids, topk_weights, rows)
    tensors = [hidden_states, topk_ids, topk_weights]
    packed_RB = pack_rows(tensors, rows, [0, -1, 0])
    hidden, ids, weights = unpack_rows(all_to_all(packed_RB.repeat(size, 1), size, group), tensors)
    return hidden, ids, weights


def _combine(hidden_states: torch.Tensor, num_rows: int, rows: int, group: str, size: int) -> torch.Tensor:
    check_group("combine", "ep", group, size)
    shapes.check_combine(hidden_states, num_rows, rows, size)
    returned_WRH = all_to_all(hidden_states, size, group).view(size, rows, hidden_states.shape[1])
    return returned_WRH.narrow(1, 0, num_rows).sum(dim=0, dtype=torch.float32).to(hidden_states.dtype)


dispatch_op = define(
    "dispatch_all_to_all(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, SymInt rows, str group, int size)"
    " -> (Tensor, Tensor, Tensor)",
    composite=_dispatch,
)
combine_op = define(
    "combine_all_to_all(Tensor hidden_states, SymInt num_rows, SymInt rows, str group, int size) -> Tensor",
    composite=_combine,
)


def dispatch_all_to_all(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, *, rows: int, ep: Group
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exchange rows, ids and weights over EP. One packed all-to-all.

    Args:
        hidden_states: ``[N, H]``.
        topk_ids: ``[N, K]``.
        topk_weights: ``[N, K]``.
        rows: R, at least N, the same on every rank of `ep`.
        ep: the EP group.

    Returns:
        ``[W * R, H]``, ``[W * R, K]`` and ``[W * R, K]``; rows that pad have ids of -1.
    """
    hidden, ids, weights = dispatch_op(hidden_states, topk_ids, topk_weights, rows, ep.name, ep.size)
    return hidden, ids, weights


def combine_all_to_all(hidden_states: torch.Tensor, *, num_rows: int, rows: int, ep: Group) -> torch.Tensor:
    """Send results back and sum each row's shares over the ranks in float32. One all-to-all.

    Args:
        hidden_states: ``[W * R, H]``, this rank's share of every row that dispatch returned.
        num_rows: N, the rows that this rank gave to dispatch.
        rows: R, as in dispatch.
        ep: the EP group.

    Returns:
        ``[N, H]``.
    """
    output: torch.Tensor = combine_op(hidden_states, num_rows, rows, ep.name, ep.size)
    return output
