"""Shapes of the All2All strategy. T tokens, P padded tokens, H hidden, E experts."""

import torch

from fake_impls.checks import check_dim, check_equal, check_floating, check_same_rows
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
    check_tokens("prepare", hidden_states, router_logits)
    num_tokens = hidden_states.shape[0]
    rows = rows_per_rank(num_tokens, size)
    return (
        hidden_states.new_empty(rows, hidden_states.shape[1]),
        router_logits.new_empty(rows, router_logits.shape[1]),
        num_tokens,
        padded_rows(num_tokens, size),
    )


def finalize_all2all(hidden_states: torch.Tensor, num_tokens: int, group: str, size: int) -> torch.Tensor:
    """``[P / size, H] -> [num_tokens, H]``."""
    check_chunk("finalize", hidden_states, num_tokens, size)
    return hidden_states.new_empty(num_tokens, hidden_states.shape[1])


def check_chunk(op: str, hidden_states: torch.Tensor, num_tokens: int, size: int) -> None:
    """A chunk that holds its share of the padded tokens."""
    check_dim(op, "hidden_states", hidden_states, 2)
    rows = rows_per_rank(num_tokens, size)
    check_equal(op, "rows of hidden_states", hidden_states.shape[0], rows, "the rows that prepare returned")
