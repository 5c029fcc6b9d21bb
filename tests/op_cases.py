"""One valid call of every op, for any number of tokens and ranks: what opcheck and the tests of shapes share.

T tokens, W ranks, H hidden, E experts, K top-k, I intermediate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import moe_ops as mo

H, E, K, I = 8, 6, 2, 4
Call = tuple[Any, ...]


class Sizes(NamedTuple):
    """What a call is made for; `group` names the group of all ranks, and `more` says how much longer lengths are than they
    have to be, or that what is optional is there."""

    tokens: int
    ranks: int = 4
    rank: int = 1
    more: int = 1
    dtype: torch.dtype = torch.float32
    width: int = 35  # a ragged block and half a byte
    group: str = "0"

    @property
    def chunk(self) -> int:
        return -(-self.tokens // self.ranks)

    @property
    def counts(self) -> list[int]:
        """Ragged rows of each rank, of which this one has T."""
        return [self.tokens if rank == self.rank else (self.tokens + 3 * rank) % 7 for rank in range(self.ranks)]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.linspace(-1, 1, steps=torch.Size(shape).numel()).reshape(shape).to(dtype)


def ids(rows: int, k: int = K) -> torch.Tensor:
    """Every expert, and -1."""
    return (torch.arange(rows * k).view(rows, k) % (E + 1) - 1).to(torch.int32)


def places(rows: int, ranks: int) -> torch.Tensor:
    """Which of `rows` rows is the copy of each row for each rank, or -1."""
    return torch.arange(rows * ranks).view(rows, ranks) % (rows + 1) - 1


def positions(rows: int, k: int = K) -> torch.Tensor:
    """Where each choice went; the first went nowhere."""
    return torch.arange(rows * k).view(rows, k) - 1


def hidden(s: Sizes, rows: int | None = None) -> torch.Tensor:
    return values(s.tokens if rows is None else rows, H, dtype=s.dtype)


def payload(s: Sizes) -> list[torch.Tensor]:
    return [hidden(s), ids(s.tokens), values(s.tokens, K)]


def quantized_bytes(s: Sizes, quant: mo.Quant) -> list[torch.Tensor]:
    x = values(s.tokens, s.width, dtype=s.dtype)
    return [part.view(torch.uint8) for part in mo.quantize_activations(x, quant=quant)]


def groups_of_rows(s: Sizes) -> torch.Tensor:
    return torch.tensor([s.tokens // 2, 0, s.tokens // 3])


def over_dp(s: Sizes) -> Call:
    return s.tokens + s.more, s.group, s.ranks, s.group, s.ranks


def over_ep(s: Sizes) -> Call:
    longest = max(s.counts) if s.more else s.tokens
    return longest, s.counts if s.more else None, s.group, s.ranks


def rows_over_ep(s: Sizes) -> int:
    return sum(s.counts) if s.more else s.tokens * s.ranks


def vllm_cpu_experts(s: Sizes) -> Call:
    width = 32  # the least that the kernel takes
    weights = values(3, 2 * width, width), values(3, width, width)
    return values(s.tokens, width), ids(s.tokens), values(s.tokens, K), 1, *weights, None, None, "silu", False


COMPOSITES: dict[str, Callable[[Sizes], Call]] = {
    "prepare_all2all": lambda s: (hidden(s), values(s.tokens, E), s.group, s.ranks, s.rank),
    "finalize_all2all": lambda s: (hidden(s, s.chunk), s.tokens, s.group, s.ranks),
    "prepare_mc2": lambda s: (
        hidden(s),
        values(s.tokens, E),
        torch.arange(s.tokens) < 3 if s.more else None,
        (s.chunk + s.more) * s.ranks,
        *(s.group, s.ranks, s.rank),
    ),
    "finalize_mc2": lambda s: (
        hidden(s, s.chunk + s.more),
        s.tokens,
        (s.chunk + s.more) * s.ranks,
        *(s.group, s.ranks),
    ),
    "prepare_allgather_dp": lambda s: ([hidden(s), ids(s.tokens)], [0, -1], *over_dp(s)),
    "finalize_allgather_dp": lambda s: (hidden(s, (s.tokens + s.more) * s.ranks**2), s.tokens, *over_dp(s)),
    "prepare_allgather_ep": lambda s: ([hidden(s), values(s.tokens, E), ids(s.tokens)], [0, 0, -1], *over_ep(s)),
    "finalize_allgather_ep": lambda s: (hidden(s, rows_over_ep(s)), s.tokens, *over_ep(s)),
    "exchange_counts": lambda s: (ids(s.tokens), 2, s.group, s.ranks),
    "dispatch_all_to_all": lambda s: (payload(s), 2, s.group, s.ranks),
    "combine_all_to_all": lambda s: (
        hidden(s, sum(s.counts)),
        places(s.tokens, s.ranks),
        s.counts[::-1],
        s.counts,
        *(s.group, s.ranks),
    ),
    "dispatch_fixed_capacity": lambda s: (payload(s), 2, s.tokens + s.more, s.group, s.ranks),
    "combine_fixed_capacity": lambda s: (
        hidden(s, (s.tokens + s.more) * s.ranks),
        places(s.tokens, s.ranks),
        *(s.group, s.ranks),
    ),
    "chunk_tokens": lambda s: (ids(s.tokens), (s.chunk + s.more) * s.ranks, s.ranks, s.rank, -1),
    "all_reduce": lambda s: (hidden(s), s.group, s.ranks),
}
LEAVES: dict[str, Callable[[Sizes], Call]] = {
    "pack_rows": lambda s: (payload(s), s.tokens + s.more, [0, -1, 0]),
    "unpack_rows": lambda s: (
        torch.zeros(s.tokens, 12, dtype=torch.uint8),
        [ids(3), values(5, 2, dtype=torch.float16)],
    ),
    "compact_rows": lambda s: (hidden(s, s.ranks * max(s.counts)), s.counts),
    "expand_rows": lambda s: (hidden(s, sum(s.counts)), s.counts),
    "quantize_int8": lambda s: (values(s.tokens, s.width, dtype=s.dtype),),
    "dequantize_int8": lambda s: (torch.ones(s.tokens, s.width, dtype=torch.int8), values(s.tokens), s.dtype),
    "quantize_mxfp8": lambda s: (values(s.tokens, s.width, dtype=s.dtype),),
    "dequantize_mxfp8": lambda s: (*quantized_bytes(s, mo.Quant.MXFP8), s.dtype),
    "quantize_mxfp4": lambda s: (values(s.tokens, s.width, dtype=s.dtype),),
    "dequantize_mxfp4": lambda s: (*quantized_bytes(s, mo.Quant.MXFP4), s.width, s.dtype),
    "route": lambda s: (
        values(s.tokens, E, dtype=s.dtype),
        torch.arange(s.tokens) < 3 if s.more else None,
        *(K, "sigmoid", bool(s.more), 3, 2, values(E), 2.5),
    ),
    "weigh_choices": lambda s: (values(s.tokens, E, dtype=s.dtype), ids(s.tokens), "softmax", bool(s.more), 2.5),
    "map_to_physical": lambda s: (ids(s.tokens), torch.tensor([[0, 6], [1, -1], [2, 7], [3, -1], [4, -1], [5, -1]]), 8),
    "count_expert_load": lambda s: (ids(s.tokens), E),
    "permute_by_expert": lambda s: ([hidden(s), values(s.tokens)], ids(s.tokens), 2, 3),
    "unpermute": lambda s: (
        hidden(s, s.tokens * K),
        values(s.tokens, K) if s.more else None,
        positions(s.tokens),
    ),
    "weigh_rows": lambda s: (hidden(s, s.tokens * K), values(s.tokens, K), positions(s.tokens)),
    "spread_rows": lambda s: (hidden(s), positions(s.tokens), s.tokens * K + s.more),
    "dot_rows": lambda s: (hidden(s, s.tokens * K), -hidden(s, s.tokens * K), positions(s.tokens)),
    "plan_copies": lambda s: (ids(s.tokens), 2, s.ranks, s.tokens // 2 if s.more else None),
    "pack_copies": lambda s: (payload(s), places(s.tokens, s.ranks), s.tokens + s.more, [0, -1, 0]),
    "grouped_linear": lambda s: (
        hidden(s),
        groups_of_rows(s),
        values(3, I, H, dtype=s.dtype),
        values(3, I, dtype=s.dtype) if s.more else None,
    ),
    "grouped_outer": lambda s: (hidden(s), values(s.tokens, I, dtype=s.dtype), groups_of_rows(s)),
    "sum_groups": lambda s: (hidden(s), groups_of_rows(s)),
    "vllm_cpu_experts": vllm_cpu_experts,
}
"""Of ops that compute. (The ops of the vLLM plugin are tested with vLLM.)"""

CASES = COMPOSITES | LEAVES
DIFFERENTIABLE = (
    *("compact_rows", "expand_rows", "route", "weigh_choices", "permute_by_expert", "unpermute", "weigh_rows"),
    "grouped_linear",
)


def registered_ops() -> set[str]:
    """The names of all ops of the library."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("moe_ops::").partition(".")[0] for name in names if name.startswith("moe_ops::")}
