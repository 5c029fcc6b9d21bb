"""What a routing does: copies that travel, the load of experts and ranks, synthetic routings."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from moe_ops.cost_types import RowCopies
from moe_ops.costs import expected_copies
from moe_ops.load import count_copies, draw_topk_ids, measure_load


@given(experts_each=st.integers(1, 8), ep=st.integers(1, 8), data=st.data())
def test_expected_copies_are_the_mean_of_counted_ones(experts_each: int, ep: int, data: st.DataObject) -> None:
    experts = experts_each * ep
    top_k = data.draw(st.integers(1, min(experts, 4)))
    ids = draw_topk_ids(500 * ep, num_experts=experts, top_k=top_k, seed=data.draw(st.integers(0, 99)))
    counted = sum(count_copies(ids.view(ep, 500, top_k), num_experts=experts).sent) / (500 * ep)
    assert counted == pytest.approx(expected_copies(num_experts=experts, top_k=top_k, ep_size=ep), abs=0.3)


def count_copies_row_by_row(ids: list[torch.Tensor], num_experts: int) -> RowCopies:
    ranks, sent, received = len(ids), [0] * len(ids), [0] * len(ids)
    for source, rows in enumerate(ids):
        for row in rows.tolist():
            for target in {chosen * ranks // num_experts for chosen in row if chosen >= 0} - {source}:
                sent[source] += 1
                received[target] += 1
    return RowCopies(tuple(sent), tuple(received))


@given(ep=st.integers(1, 4), experts_each=st.integers(1, 3), seed=st.integers(0, 999), data=st.data())
def test_count_copies(ep: int, experts_each: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = data.draw(st.lists(st.integers(0, 7), min_size=ep, max_size=ep))
    ids = [torch.randint(-1, ep * experts_each, (count, 3), generator=generator) for count in rows]
    assert count_copies(ids, num_experts=ep * experts_each) == count_copies_row_by_row(ids, ep * experts_each)


def test_load() -> None:
    load = measure_load(torch.tensor([[0, 1], [0, 3], [0, -1]]), num_experts=4, ep_size=2)
    assert load == ((3, 1, 0, 1), (4, 1), 3 / (5 / 4), 4 / (5 / 2))
    assert measure_load(torch.empty(0, 2, dtype=torch.int32), num_experts=4, ep_size=2)[2:] == (1.0, 1.0)


def test_drawn_routings() -> None:
    even, skewed = (draw_topk_ids(20000, num_experts=64, top_k=4, exponent=exponent) for exponent in (0.0, 1.2))
    for ids in (even, skewed):
        assert ids.shape == (20000, 4) and ids.dtype == torch.int32
        assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()  # no expert twice
    loads = [sorted(measure_load(ids, num_experts=64, ep_size=1).experts, reverse=True) for ids in (even, skewed)]
    assert loads[0][0] < 1.15 * loads[0][-1]
    first = draw_topk_ids(20000, num_experts=64, top_k=1, exponent=1.2)
    shares = sorted(measure_load(first, num_experts=64, ep_size=1).experts, reverse=True)
    assert shares[0] / shares[1] == pytest.approx(2**1.2, rel=0.1)
    assert torch.equal(even, draw_topk_ids(20000, num_experts=64, top_k=4))


NOTHING = torch.zeros(3, 1, 1, dtype=torch.int32)
ERRORS = {
    "count_copies: num_experts must be a multiple of EP = 3, got 8": lambda: count_copies(NOTHING, num_experts=8),
    "measure_load: num_experts must be a multiple of EP = 3, got 8": lambda: measure_load(
        NOTHING[0], num_experts=8, ep_size=3
    ),
    r"draw_topk_ids: top_k must be in \[1, num_experts = 4\], got 5": lambda: draw_topk_ids(1, num_experts=4, top_k=5),
    "draw_topk_ids: exponent must be at least 0, got -1": lambda: draw_topk_ids(1, num_experts=4, top_k=2, exponent=-1),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()
