"""The benchmarks' own parts: that they compare what they say, and show what they found. The cases themselves take minutes."""

import pytest
import torch

import moe_ops as mo
from benchmarks import contest, forms, layer, ours, report
from benchmarks.calls import Calls, count_calls
from benchmarks.cases import eager, host
from benchmarks.registry import Aim, Case, Table
from moe_ops.collectives import all_gather

from .ranks import RankPool, groups_of


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


def prepare_and_by_hand(rank: int, form: forms.Form) -> set[str]:
    return set(eager._measure_form(groups_of(2, 1, 1).ep, form, 5, rounds=1, is_real=True))


@pytest.mark.slow
@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: form.name)
def test_prepare_and_finalize_do_what_is_written_by_hand(ranks2: RankPool, form: forms.Form) -> None:
    assert ranks2.run(prepare_and_by_hand, form) == [{"prepare", "finalize"}] * 2  # which it checks before it measures


def test_ops_do_what_is_written_by_hand() -> None:
    timings = host._measure_ops(mo.Group.single(), rounds=1)
    assert len(timings) == 3 * len(host._subjects())


def errors_of_paths(rank: int) -> dict[str, float]:
    group, dtype = groups_of(2, 1, 1).ep, torch.float32
    weights, batch = layer.make_weights(dtype), layer.make_batch(dtype, 5, rank)
    expected, errors = layer.expected_of(batch, weights), {}
    for path in ours.PATHS + ours.FLOAT32_PATHS:
        call, arrange = ours.build_stage(path, weights, group)
        errors[path.name] = (call(*arrange(batch)) - expected).abs().max().item() / expected.abs().max().item()
    return errors


@pytest.mark.slow
def test_every_path_computes_the_layer(ranks2: RankPool) -> None:
    for errors in ranks2.run(errors_of_paths):
        assert len(errors) == 9
        assert max(errors.values()) < contest.TOLERANCE[torch.float32], errors


def calls_of_forms(rank: int) -> dict[str, tuple[Calls, tuple[float, float]]]:
    return host._measure_stage(groups_of(2, 1, 1).ep, rounds=2)


@pytest.mark.slow
def test_at_most_five_frames_to_a_collective(ranks2: RankPool) -> None:
    found, other = ranks2.run(calls_of_forms)
    collectives = {"ALL2ALL, ALL_TO_ALL": 3}  # the first is that of the counts
    for name, (calls, (median, least)) in found.items():
        assert len(calls.frames) == collectives.get(name, 2)
        assert max(calls.frames) <= 5, name
        assert 0 < calls.before < calls.total
        assert 0 < least <= median
        assert calls == other[name][0]
    assert len(found) == 5
    assert found["ALLGATHER DP"][0].frames == (4, 4)  # moe_stage, run_stream, the step and what it calls


def test_frames_are_counted_from_the_stage() -> None:
    with pytest.raises(RuntimeError, match="count_calls: call must call moe_stage, which is not on the stack"):
        count_calls(lambda: all_gather(torch.ones(1), 2, "none"))


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
