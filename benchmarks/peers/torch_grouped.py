"""torch itself: two calls of ``F.grouped_mm``, with gate and up in one product. float32 is not compiled: its Meta rejects it.

T tokens, H hidden, I intermediate, E experts, K top-k, R = T * K rows, N = 2 * I.
"""

import logging

import torch
import torch.nn.functional as F

import moe_ops as mo
from benchmarks.contest import Entry, Implementation
from benchmarks.layer import EXPERTS as NUM_EXPERTS
from benchmarks.layer import HIDDEN, TOP_K, Weights


def build_experts(weights: Weights, _: mo.Group) -> Implementation:
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # of that failure: the tables show it

    def run(hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        ids_R, order_R = ids_TK.flatten().sort()
        counts_E = ids_R.new_zeros(NUM_EXPERTS).scatter_add(0, ids_R, torch.ones_like(ids_R))
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        both_RN = F.grouped_mm(hidden_TH[order_R // TOP_K], weights.w13.transpose(1, 2), offs=ends_E)
        gate_RI, up_RI = both_RN.chunk(2, dim=1)
        rows_RH = F.grouped_mm(F.silu(gate_RI) * up_RI, weights.w2.transpose(1, 2), offs=ends_E)
        unsorted_RH = torch.empty_like(rows_RH).index_copy(0, order_R, rows_RH)
        weighed_TKH = unsorted_RH.view(-1, TOP_K, HIDDEN).float() * weights_TK.unsqueeze(2)
        return weighed_TKH.sum(dim=1).to(hidden_TH.dtype)

    return Implementation(run, lambda batch: batch)


EXPERTS = Entry("grouped_mm", build_experts, requires="torch")
