"""The layer that the cases of the stage measure: its sizes, weights and tokens.

T tokens of a rank, H hidden, I intermediate, E experts, K top-k.
"""

from typing import NamedTuple

import torch

import moe_ops as mo

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 1024, 512, 32, 4
SIZES = f"H={HIDDEN}, I={INTERMEDIATE}, E={EXPERTS}, k={TOP_K}"
ROUTING = mo.Routing(TOP_K, EXPERTS)
DECODE, PREFILL = (1, 8), (64, 256, 512)
TOKENS = DECODE + PREFILL
DTYPES = (torch.bfloat16, torch.float32)


class Weights(NamedTuple):
    """Those of the whole layer.

    Attributes:
        w13: ``[E, 2 * I, H]``, the gate's rows first.
        w2: ``[E, H, I]``.
        router: ``[E, H]``.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    router: torch.Tensor

    def clone(self) -> "Weights":
        return Weights(*(weight.clone() for weight in self))

    def share_of(self, group: mo.Group) -> mo.ExpertWeights:
        """The experts of one rank."""
        num_local = EXPERTS // group.size
        mine = slice(group.rank * num_local, (group.rank + 1) * num_local)
        return mo.ExpertWeights(self.w13[mine].clone(), self.w2[mine].clone())


class Batch(NamedTuple):
    """The tokens of one rank.

    Attributes:
        hidden_states: ``[T, H]``.
        topk_ids: int64 ``[T, K]``, what the router chooses.
        topk_weights: float32 ``[T, K]``.
    """

    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor

    def clone(self) -> "Batch":
        return Batch(*(tensor.clone() for tensor in self))


def make_weights(dtype: torch.dtype) -> Weights:
    """Random experts; a router that reads its logits from the first E elements of a token."""
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) * HIDDEN**-0.5
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) * INTERMEDIATE**-0.5
    return Weights(w13.to(dtype), w2.to(dtype), torch.eye(EXPERTS, HIDDEN, dtype=dtype))


def make_batch(dtype: torch.dtype, tokens: int, rank: int) -> Batch:
    """Random tokens. Each token's logits are a permutation of multiples of 1/8, which are exact in bfloat16: all experts are
    chosen equally often, and no choice hangs on how an implementation rounds its scores."""
    generator = torch.Generator().manual_seed(1000 * rank + tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    logits = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1) / 8
    hidden[:, :EXPERTS] = logits
    scores, topk_ids = logits.softmax(dim=1).topk(TOP_K)
    return Batch(hidden.to(dtype), topk_ids, scores / scores.sum(dim=1, keepdim=True))


def expected_of(batch: Batch, weights: Weights) -> torch.Tensor:
    """What the layer makes of the batch, float32 ``[T, H]``."""
    experts = mo.ExpertWeights(weights.w13.float(), weights.w2.float())
    hidden = batch.hidden_states.float()
    return mo.reference.moe_stage(hidden, hidden @ weights.router.float().T, experts, ROUTING)


def touched_bytes(batch: Batch, weights: Weights) -> int:
    """Bytes of the weights of all experts that the batch has a choice of."""
    num_experts = batch.topk_ids.unique().numel()
    return num_experts * sum(weight[0].numel() * weight.element_size() for weight in (weights.w13, weights.w2))
