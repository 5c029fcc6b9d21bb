"""One packed all-gather of several tensors against one all-gather for each of them.

T tokens of each rank, H hidden, E experts.
"""

from collections.abc import Callable, Sequence

import torch

import moe_ops as mo
from benchmarks.forms import EXPERTS, HIDDEN
from benchmarks.ranks import Ranks
from benchmarks.registry import Aim, Case, Chart, Effort, Table
from benchmarks.timing import Timing, compare, slowest
from moe_ops.collectives import all_gather, gather_rows

TOKENS = (8, 64, 512)
PAYLOADS = ("bf16 hidden + fp32 logits", "int8 hidden + scale + fp32 logits")
CALLS = 20
AIM = 0.7

c10d = torch.ops._c10d_functional


def measure_packing(effort: Effort) -> list[Table]:
    columns = ("payload", "T", "packed us", "by hand us", "separate us", "ratio", "ratio by hand")
    note = (
        "separate: each all-gather is awaited before the next starts. by hand: packed with cat, unpacked with "
        "contiguous and view. Ratios: to separate; the aim is for decode, T = 8."
    )
    table = Table(
        f"Packed against separate all-gathers, H={HIDDEN}, E={EXPERTS}, 2 gloo ranks",
        columns,
        note,
        2,
        Aim("ratio", AIM),
        lambda row: row["T"] == TOKENS[0],
        Chart(columns[2:5], "us"),
    )
    with Ranks(2) as ranks:
        for payload in PAYLOADS:
            for tokens in effort.pick(TOKENS):
                timings = slowest(ranks.run(_measure_payload, payload, tokens, effort.rounds))
                packed, by_hand, separate = (timings[name].wall for name in ("packed", "by hand", "separate"))
                times = [1e6 * wall for wall in (packed, by_hand, separate)]
                table.add(payload, tokens, *times, packed / separate, by_hand / separate)
    return [table]


def _measure_payload(group: mo.Group, payload: str, tokens: int, rounds: int) -> dict[str, Timing]:
    tensors = _make_payload(payload, tokens)
    fill = [0] * len(tensors)
    variants: dict[str, Callable[[], list[torch.Tensor]]] = {
        "packed": lambda: gather_rows(tensors, tokens, fill, group.size, group.name)(),
        "by hand": lambda: _gather_by_hand(tensors, group),
        "separate": lambda: [all_gather(tensor, group.size, group.name)() for tensor in tensors],
    }
    for results in zip(*(call() for call in variants.values()), strict=True):
        for result in results[1:]:
            torch.testing.assert_close(results[0], result, rtol=0, atol=0)
    return compare(variants, rounds=rounds, calls=CALLS)


def _make_payload(payload: str, tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden, logits = (torch.randn(tokens, width, generator=generator) for width in (HIDDEN, EXPERTS))
    if payload.startswith("bf16"):
        return [hidden.to(torch.bfloat16), logits]
    scale = hidden.abs().amax(dim=1) / 127
    return [(hidden / scale.unsqueeze(1)).round().to(torch.int8), scale, logits]


def _gather_by_hand(tensors: Sequence[torch.Tensor], group: mo.Group) -> list[torch.Tensor]:
    """Not with several gathers in flight: gloo of torch 2.13 corrupts the heap within seconds when two are."""
    columns = [tensor.view(tensor.shape[0], -1).view(torch.uint8) for tensor in tensors]
    packed = c10d.wait_tensor(c10d.all_gather_into_tensor(torch.cat(columns, dim=1), group.size, group.name))
    split = packed.split([column.shape[1] for column in columns], dim=1)
    return [
        part.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:])
        for part, tensor in zip(split, tensors, strict=True)
    ]


CASE = Case("packing", "Is one packed collective faster than one for each tensor?", measure_packing)
