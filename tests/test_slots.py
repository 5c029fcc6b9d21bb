"""Copies of experts: their table, and which of them a row goes to."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import moe_ops as mo
from moe_ops.slots import place_copies, to_physical

PROPER = torch.tensor([[0, 4, 5], [1, -1, -1], [2, 3, -1]], dtype=torch.int32)


@given(slots=st.lists(st.integers(0, 4), max_size=9))
def test_the_table_holds_each_slot_once(slots: list[int]) -> None:
    slots = [*range(5), *slots]
    table = place_copies(slots, num_experts=5)
    assert table.dtype is torch.int32
    for expert, held in enumerate(table.tolist()):
        assert [slot for slot in held if slot >= 0] == [slot for slot, other in enumerate(slots) if other == expert]


def test_copies_take_turns() -> None:
    routing = mo.Routing(1, 3, logical_to_physical=PROPER, num_redundant_experts=3)
    ids = torch.tensor([[0], [0], [0], [0], [1], [2], [2], [-1]])
    assert to_physical(ids, routing).flatten().tolist() == [0, 4, 5, 0, 1, 3, 2, -1]
    assert to_physical(ids, routing._replace(logical_to_physical=None)) is ids
    holes = torch.tensor([[0, 4, 5], [-1, 1, -1], [2, -1, 3]])
    assert torch.equal(to_physical(ids, routing), to_physical(ids, routing._replace(logical_to_physical=holes)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.tensor([[0, 4], [1, 6], [2, 3]]), r"must hold different slots below 6, got \[0, 1, 2, 3, 4, 6\]"),
        (torch.tensor([[0, 4], [1, 0], [2, 3]]), r"must hold different slots below 6, got \[0, 0, 1, 2, 3, 4\]"),
        (torch.tensor([[0, 4], [-1, -1], [2, 3]]), r"must hold a slot for each expert, got none for \[1\]"),
        (torch.tensor([0, -1, 2]), r"must hold a slot for each expert, got none for \[1\]"),
        (torch.tensor([[0], [1]]), r"must be of 3 experts, got \(2, 1\)"),
        (torch.tensor(0), r"must be of 3 experts, got \(\)"),
    ],
)
def test_a_wrong_table_is_refused(table: torch.Tensor, message: str) -> None:
    """Tokens would lose shares, or get those of another expert."""
    routing = mo.Routing(1, 3, logical_to_physical=table, num_redundant_experts=3)
    with pytest.raises(ValueError, match=f"route: logical_to_physical {message}"):
        to_physical(torch.zeros(2, 1, dtype=torch.int32), routing)


def test_a_table_is_not_made_of_wrong_slots() -> None:
    with pytest.raises(ValueError, match=r"experts_of_slots must hold experts in \[0, 3\), got 3 in slot 1"):
        place_copies([0, 3, 1, 2], num_experts=3)
    with pytest.raises(ValueError, match=r"experts_of_slots must hold every expert, got none of \[1\]"):
        place_copies([0, 0, 2], num_experts=3)
