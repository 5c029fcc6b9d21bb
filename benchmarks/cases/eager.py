"""Eager cost of a call against the same work written out by hand."""

from collections.abc import Callable
from typing import Any

import torch

import moe_ops as mo
from benchmarks import inline
from benchmarks.forms import (
    ALL2ALL,
    ALLGATHER_DP,
    ALLGATHER_EP,
    ALLGATHER_EP_RAGGED,
    FORMS,
    MC2,
    Form,
    call_prepare,
    make_inputs,
)
from benchmarks.ranks import Ranks
from benchmarks.registry import Aim, Case, Chart, Effort, Table
from benchmarks.timing import Timing, compare, slowest

TOKENS = (8, 512)
CALLS = 20
AIM = 1.5

INLINE: dict[Form, tuple[Callable[..., list[torch.Tensor]], Callable[..., torch.Tensor]]] = {
    ALL2ALL: (inline.prepare_all2all, inline.finalize_chunks),
    MC2: (inline.prepare_mc2, inline.finalize_chunks),
    ALLGATHER_DP: (inline.prepare_allgather, inline.finalize_allgather),
    ALLGATHER_EP: (inline.prepare_allgather, inline.finalize_allgather),
    ALLGATHER_EP_RAGGED: (inline.prepare_allgather_ragged, inline.finalize_allgather_ragged),
}


def measure_eager(effort: Effort) -> list[Table]:
    tables = []
    for is_fake, place in ((False, "2 gloo ranks"), (True, "one process of a fake group of 2: nothing is sent")):
        table = _make_table(place)
        with Ranks(2, is_fake=is_fake) as ranks:
            for tokens in effort.pick(TOKENS):
                for form in FORMS:
                    for step, timings in _merge(ranks.run(_measure_form, form, tokens, effort.rounds, not is_fake)):
                        table.add(f"{step} {form.name}", tokens, *_cells(timings))
        tables.append(table)
    return tables


def _make_table(place: str) -> Table:
    columns = ("op", "T", "moe_ops us", "inline us", "ratio", "moe_ops CPU us", "inline CPU us", "CPU ratio")
    return Table(
        f"Eager cost of a call, {place}", columns, num_labels=2, aim=Aim("ratio", AIM), chart=Chart(columns[2:4], "us")
    )


def _measure_form(group: mo.Group, form: Form, tokens: int, rounds: int, is_real: bool) -> dict[str, dict[str, Timing]]:
    layout = form.layout(group)
    inputs = make_inputs(group, form.tokens(group.size, tokens))
    prepare, finalize = INLINE[form]
    ours = call_prepare(form, layout, inputs)
    prepared = ours()
    y = prepared.hidden_states
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "prepare": (ours, lambda: prepare(group, inputs)),
        "finalize": (
            lambda: mo.finalize(y, prepared.state, layout),
            lambda: finalize(group, inputs, y),
        ),
    }
    if is_real:
        _check_equal(pairs)
    return {
        step: compare({"moe_ops": library, "inline": by_hand}, rounds=rounds, calls=CALLS)
        for step, (library, by_hand) in pairs.items()
    }


def _check_equal(pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]]) -> None:
    """What is compared does the same work."""
    prepared, by_hand = (call() for call in pairs["prepare"])
    tensors = [tensor for tensor in prepared[:3] if tensor is not None]
    for tensor, expected in zip(tensors, by_hand, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    torch.testing.assert_close(*(call() for call in pairs["finalize"]), rtol=0, atol=0)


def _merge(answers: list[dict[str, dict[str, Timing]]]) -> list[tuple[str, dict[str, Timing]]]:
    return [(step, slowest([answer[step] for answer in answers])) for step in answers[0]]


def _cells(timings: dict[str, Timing]) -> list[float]:
    ours, by_hand = timings["moe_ops"], timings["inline"]
    wall = [1e6 * ours.wall, 1e6 * by_hand.wall, ours.wall / by_hand.wall]
    return [*wall, 1e6 * ours.cpu, 1e6 * by_hand.cpu, ours.cpu / by_hand.cpu]


CASE = Case("eager", "What does a call cost over the same calls and collectives written by hand?", measure_eager)
