"""The benchmarks' own parts: that they compare what they say, and show what they found. The cases themselves take minutes."""

import pytest
import torch

import moe_ops as mo
from benchmarks import contest, layer, ours, report
from benchmarks.registry import Aim, Case, Table


def choose(batch: layer.Batch, router: torch.Tensor) -> torch.Tensor:
    """The experts of each token, in order, by a router in the batch's own dtype."""
    return (batch.hidden_states @ router.T).topk(layer.TOP_K).indices.sort().values


@pytest.mark.parametrize("dtype", layer.DTYPES)
def test_choices_do_not_depend_on_rounding(dtype):
    batch = layer.make_batch(dtype, 64, rank=1)
    chosen = choose(batch, layer.make_weights(dtype).router)
    assert torch.equal(chosen, batch.topk_ids.sort().values)


@pytest.mark.parametrize("dtype", layer.DTYPES)
def test_a_contest_checks_values(dtype):
    weights, batch = layer.make_weights(dtype), layer.make_batch(dtype, 8, rank=0)
    call, arrange = ours.build_experts(weights, mo.Group.single())
    expected, result = layer.expected_of(batch, weights), call(*arrange(batch))
    answer, tolerance = contest.Answer({}, {}, {}, {}), contest.TOLERANCE[dtype]
    assert contest._check("right", {8: lambda: result}, {8: expected}, tolerance, answer)
    wrong = result.clone()
    wrong[5] *= 1.05  # one row of eight
    with pytest.raises(AssertionError, match="wrong: rows must be within"):
        contest._check("wrong", {8: lambda: wrong}, {8: expected}, tolerance, answer)


def test_a_missing_package_leaves_an_entry_out():
    assert not contest.Entry("none", ours.build_experts, requires="no_such_package").is_available
    entries = ours.EXPERTS_ENTRIES + ours.STAGE_ENTRIES
    assert all(entry.is_available for entry in entries if entry.requires != "vllm")


def test_text_stands_where_there_is_no_number(tmp_path):
    table = Table("Times", ("name", "ratio"), aim=Aim("ratio", 1.0))
    table.add("slow", 1.5)
    table.add("fast", 0.5)
    table.add("absent", "-")
    assert table.missed() == [("slow", 1.5)]
    report.write_markdown(tmp_path / "page.md", "python -m x", [(Case("x", "Fast?", lambda _: []), [table])])
    page = (tmp_path / "page.md").read_text()
    assert "| **slow** | **1.50** |\n| fast | 0.50 |\n| absent | - |" in page
    assert "1 of 2 rows within it, from 0.50 to 1.50." in page
