"""Shapes of the MC2 strategy. T tokens, P padded tokens, H hidden, E experts."""

import torch

from fake_impls.checks import check_at_most, check_dim, check_dtype, check_equal, check_multiple
from fake_impls.strategies.all2all import check_tokens


def prepare_mc2(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    mc2_mask: torch.Tensor | None,
    padded_num_tokens: int,
    group: str,
    size: int,
    rank: int,
) -> tuple[list[torch.Tensor], int, int]:
    """``[T, H], [T, E], bool [P]? -> [P / size, ...] each, T, P`` with ``P = padded_num_tokens``."""
    tensors = [hidden_states, router_logits] if mc2_mask is None else [hidden_states, router_logits, mc2_mask]
    check_prepare(hidden_states, router_logits, mc2_mask, padded_num_tokens, size)
    chunks = [tensor.new_empty(padded_num_tokens // size, *tensor.shape[1:]) for tensor in tensors]
    return chunks, hidden_states.shape[0], padded_num_tokens


def chunk_mc2_mask(mask: torch.Tensor, num_rows: int, size: int, rank: int) -> torch.Tensor:
    """``bool [P] -> bool [P / size]``."""
    check_mask("prepare", mask, mask.shape[0], size)
    check_at_most("prepare", "rows of hidden_states", num_rows, mask.shape[0] // size, "padded_num_tokens / TP")
    return mask.new_empty(mask.shape[0] // size)


def finalize_mc2(
    hidden_states: torch.Tensor, num_tokens: int, padded_num_tokens: int, group: str, size: int
) -> torch.Tensor:
    """``[P / size, H] -> [num_tokens, H]``."""
    check_finalize(hidden_states, padded_num_tokens, size)
    return hidden_states.new_empty(num_tokens, hidden_states.shape[1])


def check_padded(op: str, padded_num_tokens: int, size: int) -> None:
    """The common length of the TP group divides into equal chunks."""
    check_multiple(op, "padded_num_tokens", padded_num_tokens, size, "the size of the TP group")


def check_mask(op: str, mask: torch.Tensor, padded_num_tokens: int, size: int) -> None:
    """One bool for each row of the padded length."""
    check_dim(op, "mc2_mask", mask, 1)
    check_dtype(op, "mc2_mask", mask, (torch.bool,))
    check_padded(op, padded_num_tokens, size)
    check_equal(op, "rows of mc2_mask", mask.shape[0], padded_num_tokens, "padded_num_tokens")


def check_prepare(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    mc2_mask: torch.Tensor | None,
    padded_num_tokens: int,
    size: int,
) -> None:
    """Tokens that fit into the padded length, and a mask of that length."""
    check_tokens("prepare", hidden_states, router_logits)
    check_padded("prepare", padded_num_tokens, size)
    check_at_most("prepare", "rows of hidden_states", hidden_states.shape[0], padded_num_tokens, "padded_num_tokens")
    if mc2_mask is not None:
        check_mask("prepare", mc2_mask, padded_num_tokens, size)


def check_finalize(hidden_states: torch.Tensor, padded_num_tokens: int, size: int) -> None:
    """All rows that MC2's prepare returned."""
    check_dim("finalize", "hidden_states", hidden_states, 2)
    rows = padded_num_tokens // size
    check_equal("finalize", "rows of hidden_states", hidden_states.shape[0], rows, "the rows that prepare returned")
