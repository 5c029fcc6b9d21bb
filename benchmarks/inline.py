"""Prepare and finalize written out by hand: what an engine would write that wants the same rows and no library.

Each does the work of its op in as few aten calls and functional collectives as a plain form needs: no checks, no state,
no graph compiler in mind (it branches on token counts). The gathers pack what travels together, as the library does.

T tokens, M rows of a rank, H hidden, E experts, W ranks, B bytes of a packed row.
"""

import torch
from torch.nn.functional import pad

import moe_ops as mo
from benchmarks.forms import Inputs

c10d = torch.ops._c10d_functional


def prepare_all2all(group: mo.Group, inputs: Inputs) -> list[torch.Tensor]:
    padded = -(-inputs.hidden_states.shape[0] // group.size) * group.size
    return [_chunk(x, padded, group) for x in inputs[:2]]


def prepare_mc2(group: mo.Group, inputs: Inputs) -> list[torch.Tensor]:
    padded = inputs.mask.shape[0]
    return [_chunk(x, padded, group) for x in inputs[:3]]


def finalize_chunks(group: mo.Group, inputs: Inputs, y_SH: torch.Tensor) -> torch.Tensor:
    return _all_gather(y_SH, group).narrow(0, 0, inputs.hidden_states.shape[0])


def prepare_allgather(group: mo.Group, inputs: Inputs) -> list[torch.Tensor]:
    return _unpack(_all_gather(_pack(inputs, max(inputs.counts)), group), inputs)


def finalize_allgather(group: mo.Group, inputs: Inputs, y_GH: torch.Tensor) -> torch.Tensor:
    return _reduce_scatter(y_GH, group).narrow(0, 0, inputs.hidden_states.shape[0])


def prepare_allgather_ragged(group: mo.Group, inputs: Inputs) -> list[torch.Tensor]:
    longest = max(inputs.counts)
    packed_GB = _all_gather(_pack(inputs, longest), group)
    blocks = [packed_GB.narrow(0, rank * longest, count) for rank, count in enumerate(inputs.counts)]
    return _unpack(torch.cat(blocks), inputs)


def finalize_allgather_ragged(group: mo.Group, inputs: Inputs, y_GH: torch.Tensor) -> torch.Tensor:
    longest = max(inputs.counts)
    blocks = [pad(block, (0, 0, 0, longest - block.shape[0])) for block in y_GH.split(inputs.counts)]
    return _reduce_scatter(torch.cat(blocks), group).narrow(0, 0, inputs.hidden_states.shape[0])


def _chunk(x: torch.Tensor, padded: int, group: mo.Group) -> torch.Tensor:
    rows = padded // group.size
    if padded > x.shape[0]:
        x = pad(x, (0, 0) * (x.dim() - 1) + (0, padded - x.shape[0]))
    return x.narrow(0, group.rank * rows, rows).clone()


def _pack(inputs: Inputs, rows: int) -> torch.Tensor:
    packed_TB = torch.cat([inputs.hidden_states.view(torch.uint8), inputs.router_logits.view(torch.uint8)], dim=1)
    if rows == packed_TB.shape[0]:
        return packed_TB
    return pad(packed_TB, (0, 0, 0, rows - packed_TB.shape[0]))


def _unpack(packed_GB: torch.Tensor, inputs: Inputs) -> list[torch.Tensor]:
    width = inputs.hidden_states.shape[1] * 2
    hidden_GB, logits_GB = packed_GB.narrow(1, 0, width), packed_GB.narrow(1, width, packed_GB.shape[1] - width)
    return [hidden_GB.contiguous().view(torch.bfloat16), logits_GB.contiguous().view(torch.float32)]


def _all_gather(x: torch.Tensor, group: mo.Group) -> torch.Tensor:
    gathered: torch.Tensor = c10d.wait_tensor(c10d.all_gather_into_tensor(x, group.size, group.name))
    return gathered


def _reduce_scatter(x: torch.Tensor, group: mo.Group) -> torch.Tensor:
    summed: torch.Tensor = c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", group.size, group.name))
    return summed
