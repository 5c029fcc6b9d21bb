"""Bytes that a rank really sends against the formula: W - 1 copies of each row, for an all-gather and a reduce-scatter.

T tokens of each rank, H hidden, E experts, W ranks.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

import moe_ops as mo
from benchmarks.forms import EXPERTS, FORMS, HIDDEN, Form, call_prepare, make_inputs
from benchmarks.ranks import Ranks
from benchmarks.registry import Aim, Case, Effort, Table
from moe_ops.traffic import Traffic, count_traffic

TOKENS = 64
WORLDS = (2, 4)
HIDDEN_BYTES, LOGITS_BYTES = 2 * HIDDEN, 4 * EXPERTS  # of one row, bfloat16 and float32
AIM = 1.05


def count_bytes(effort: Effort) -> list[Table]:
    columns = ("step", "W", "collectives", "bytes sent", "formula", "ratio")
    note = (
        f"T={TOKENS}, H={HIDDEN}, E={EXPERTS}; the rank that sends most. Formula: (W - 1) copies of a row for the rows "
        "that a rank brings (all-gather) or keeps (reduce-scatter). gloo's reduce-scatter sends 2 (W - 1) / W of its "
        "input, as its all-reduce does, which is twice the formula: the aim is for the all-gathers."
    )
    table = Table("Bytes sent by a rank, counted at its sockets", columns, note, 2, Aim("ratio", AIM), _is_gather)
    for world in effort.pick(WORLDS):
        with Ranks(world) as ranks:
            for form in FORMS:
                for step, answers in zip(
                    ("prepare", "finalize"), zip(*ranks.run(_count, form), strict=True), strict=True
                ):
                    counted = Traffic(*map(max, zip(*answers, strict=True)))
                    formula = _formula(form, step, world)
                    ratio = counted.bytes_sent / formula if formula else 1.0 + counted.bytes_sent
                    table.add(f"{step} {form.name}", world, *counted, formula, ratio)
    return [table]


def _is_gather(row: dict[str, str | float]) -> bool:
    return not str(row["step"]).startswith("finalize ALLGATHER")


def _count(group: mo.Group, form: Form) -> tuple[Traffic, Traffic]:
    layout = form.layout(group)
    prepare = call_prepare(form, layout, make_inputs(group, form.tokens(group.size, TOKENS)))
    prepared = prepare()
    y, state = prepared.hidden_states, prepared.state
    return _count_call(prepare), _count_call(lambda: mo.finalize(y, state, layout))


def _count_call(call: Callable[[], Any]) -> Traffic:
    call()
    dist.barrier()
    return count_traffic(call)


def _formula(form: Form, step: str, world: int) -> int:
    """Bytes of the formula, in arithmetic of its own. Ragged ranks send padded rows: the collective is even."""
    if form.strategy is mo.Strategy.ALLGATHER:
        row = HIDDEN_BYTES + LOGITS_BYTES if step == "prepare" else HIDDEN_BYTES
        return (world - 1) * TOKENS * row
    return 0 if step == "prepare" else (world - 1) * (TOKENS // world) * HIDDEN_BYTES


CASE = Case("bytes", "Does a rank send what the formula says?", count_bytes)
