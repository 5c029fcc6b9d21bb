"""Shapes of ALL2ALL and MC2. T tokens, P padded tokens, H hidden, E experts."""

import torch

from fake_impls.checks import (
    check_at_most,
    check_dim,
    check_dtype,
    check_equal,
    check_floating,
    check_multiple,
    check_same_rows,
)
from fake_impls.layout import padded_rows, rows_per_rank


def check_tokens(op: str, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> None:
    """Both 2-D and floating-point, with as many rows: what every strategy's prepare takes."""
    check_dim(op, "hidden_states", hidden_states, 2)
    check_dim(op, "router_logits", router_logits, 2)
    check_floating(op, "hidden_states", hidden_states)
    check_floating(op, "router_logits", router_logits)
    check_same_rows(op, "router_logits", router_logits, "hidden_states", hidden_states)


def prepare_all2all(
    hidden_states: torch.Tensor, router_logits: torch.Tensor, group: str, size: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """``[T, H], [T, E] -> [P / size, H], [P / size, E], T, P`` with ``P = ceil(T / size) * size``."""
    num_tokens = hidden_states.shape[0]
    rows = rows_per_rank(num_tokens, size)
    hidden_chunk = hidden_states.new_empty(rows, hidden_states.shape[1])
    return (
        hidden_chunk,
        router_logits.new_empty(rows, router_logits.shape[1]),
        num_tokens,
        padded_rows(num_tokens, size),
    )


def check_prepare_all2all(hidden_states: torch.Tensor, router_logits: torch.Tensor, *_: object) -> None:
    check_tokens("prepare", hidden_states, router_logits)


def finalize_all2all(hidden_states: torch.Tensor, num_tokens: int, group: str, size: int) -> torch.Tensor:
    """``[P / size, H] -> [num_tokens, H]``."""
    return hidden_states.new_empty(num_tokens, hidden_states.shape[1])


def check_finalize_all2all(hidden_states: torch.Tensor, num_tokens: int, group: str, size: int) -> None:
    check_chunk(hidden_states, rows_per_rank(num_tokens, size))


def prepare_mc2(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    mask: torch.Tensor | None,
    padded_num_tokens: int,
    group: str,
    size: int,
    rank: int,
) -> list[torch.Tensor]:
    """``[T, H], [T, E], bool [T]? -> [P / size, ...] each`` with ``P = padded_num_tokens``."""
    tensors = [hidden_states, router_logits] if mask is None else [hidden_states, router_logits, mask]
    return [tensor.new_empty(padded_num_tokens // size, *tensor.shape[1:]) for tensor in tensors]


def check_prepare_mc2(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    mask: torch.Tensor | None,
    padded_num_tokens: int,
    group: str,
    size: int,
    *_: object,
) -> None:
    check_tokens("prepare", hidden_states, router_logits)
    check_multiple("prepare", "padded_num_tokens", padded_num_tokens, size, "the size of the TP group")
    check_at_most("prepare", "rows of hidden_states", hidden_states.shape[0], padded_num_tokens, "padded_num_tokens")
    if mask is not None:
        check_dim("prepare", "mask", mask, 1)
        check_dtype("prepare", "mask", mask, (torch.bool,))
        check_same_rows("prepare", "mask", mask, "hidden_states", hidden_states)


def finalize_mc2(
    hidden_states: torch.Tensor, num_tokens: int, padded_num_tokens: int, group: str, size: int
) -> torch.Tensor:
    """``[P / size, H] -> [num_tokens, H]``."""
    return hidden_states.new_empty(num_tokens, hidden_states.shape[1])


def check_finalize_mc2(
    hidden_states: torch.Tensor, num_tokens: int, padded_num_tokens: int, group: str, size: int
) -> None:
    check_chunk(hidden_states, padded_num_tokens // size)


def check_chunk(hidden_states: torch.Tensor, rows: int) -> None:
    """All rows that prepare returned."""
    check_dim("finalize", "hidden_states", hidden_states, 2)
    check_equal("finalize", "rows of hidden_states", hidden_states.shape[0], rows, "the rows that prepare returned")
