"""Slots of experts: where the copies of an expert are, and which of them a row goes to.

T tokens, E experts, K top-k, R copies of an expert.
"""

from collections.abc import Sequence

import torch

from fake_impls import slots as shapes
from moe_ops._library import add_kernel, cast, define
from moe_ops.types import Routing


def _map_to_physical(topk_ids: torch.Tensor, logical_to_physical: torch.Tensor, num_slots: int) -> torch.Tensor:
    slots_ER = logical_to_physical if logical_to_physical.dim() == 2 else logical_to_physical.unsqueeze(1)
    there_first_ER = torch.sort(slots_ER >= 0, dim=1, descending=True, stable=True).indices
    slots_ER = slots_ER.gather(1, there_first_ER)
    logical_TK = topk_ids.clamp(min=0).to(torch.int64)
    num_copies_TK = (slots_ER >= 0).sum(dim=1)[logical_TK].clamp(min=1)
    row_T1 = torch.arange(topk_ids.shape[0], device=topk_ids.device).unsqueeze(1)
    slots_TK = slots_ER[logical_TK, row_T1 % num_copies_TK]
    return cast(torch.where(topk_ids >= 0, slots_TK, -1), torch.int32)


def _map_to_physical_on_host(topk_ids: torch.Tensor, logical_to_physical: torch.Tensor, num_slots: int) -> torch.Tensor:
    """On a CPU the table can be read for nothing, and a wrong one be named."""
    _check_table(logical_to_physical, num_slots)
    return _map_to_physical(topk_ids, logical_to_physical, num_slots)


def _check_table(logical_to_physical: torch.Tensor, num_slots: int) -> None:
    slots_of = [
        [slot for slot in held if slot >= 0] for held in logical_to_physical.view(len(logical_to_physical), -1).tolist()
    ]
    slots = [slot for held in slots_of for slot in held]
    if any(slot >= num_slots for slot in slots) or len(set(slots)) != len(slots):
        raise ValueError(f"route: logical_to_physical must hold different slots below {num_slots}, got {sorted(slots)}")
    missing = [expert for expert, held in enumerate(slots_of) if not held]
    if missing:
        raise ValueError(f"route: logical_to_physical must hold a slot for each expert, got none for {missing}")


map_to_physical = define(
    "map_to_physical(Tensor topk_ids, Tensor logical_to_physical, int num_slots) -> Tensor",
    kernel=_map_to_physical,
    fake=shapes.map_to_physical,
    check=shapes.check_map_to_physical,
)
add_kernel("map_to_physical", _map_to_physical_on_host, "CPU")


def to_physical(topk_ids: torch.Tensor, routing: Routing) -> torch.Tensor:
    """int32 ``[T, K]``: the slots of experts, where `routing` has a table of copies; else the ids as they are.

    Of several copies of an expert, row 0 takes the first, row 1 the second, and so on, and then from the first again.

    Raises:
        ValueError: the table is not of `num_experts` experts; on a CPU also if it has a wrong slot.

    Example: expert 0 is in slots 0 and 2::

        routing = mo.Routing(
            top_k=1, num_experts=2, num_redundant_experts=1, logical_to_physical=place_copies([0, 1, 0], num_experts=2)
        )
        to_physical(torch.tensor([[0], [0], [1]]), routing)  # [[0], [2], [1]]
    """
    table = routing.logical_to_physical
    if table is None:
        return topk_ids
    if table.dim() < 1 or table.shape[0] != routing.num_experts:
        raise ValueError(
            f"route: logical_to_physical must be of {routing.num_experts} experts, got {tuple(table.shape)}"
        )
    slots: torch.Tensor = map_to_physical(topk_ids, table, routing.num_experts + routing.num_redundant_experts)
    return slots


def place_copies(experts_of_slots: Sequence[int], *, num_experts: int) -> torch.Tensor:
    """The table of `Routing.logical_to_physical`: int32 ``[E, copies]``, -1 where an expert has fewer copies than others.

    Args:
        experts_of_slots: the expert that each slot holds, of all ranks in turn.
        num_experts: E.

    Raises:
        ValueError: a slot holds no expert of the layer, or an expert is in no slot.

    Example: 3 experts in 4 slots, the first of them twice::

        place_copies([0, 1, 2, 0], num_experts=3)  # [[0, 3], [1, -1], [2, -1]]
    """
    slots: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(experts_of_slots):
        if not 0 <= expert < num_experts:
            raise ValueError(
                f"place_copies: experts_of_slots must hold experts in [0, {num_experts}), got {expert} in slot {slot}"
            )
        slots[expert].append(slot)
    missing = [expert for expert, held in enumerate(slots) if not held]
    if missing:
        raise ValueError(f"place_copies: experts_of_slots must hold every expert, got none of {missing}")
    width = max(map(len, slots), default=0)
    return torch.tensor([held + [-1] * (width - len(held)) for held in slots], dtype=torch.int32).view(-1, width)
