"""Checks of arguments, shared by shape functions and op bodies, so that eager and traced calls fail alike.

What is static (dimensions, dtypes, group sizes) is compared at once. What may be symbolic (row counts) goes through
``torch._check_value``: a ``ValueError`` where the value is known, a runtime assertion in the graph where it is not.
"""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_dim(op: str, name: str, tensor: torch.Tensor, dim: int) -> None:
    if tensor.dim() != dim:
        raise ValueError(f"{op}: {name} must be {dim}-D, got {tensor.dim()}-D of shape {tuple(tensor.shape)}")


def check_dtype(op: str, name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{op}: {name} must have one of the dtypes {names}, got {tensor.dtype}")


def check_floating(op: str, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating-point dtype, got {tensor.dtype}")


def check_equal(op: str, name: str, got: int, wanted: int, meaning: str) -> None:
    _check(got == wanted, op, name, "", meaning, wanted, got)


def check_at_most(op: str, name: str, got: int, limit: int, meaning: str) -> None:
    _check(got <= limit, op, name, "at most ", meaning, limit, got)


def check_at_least(op: str, name: str, got: int, limit: int, meaning: str) -> None:
    _check(got >= limit, op, name, "at least ", meaning, limit, got)


def check_multiple(op: str, name: str, got: int, factor: int, meaning: str) -> None:
    _check(got % factor == 0, op, name, "a multiple of ", meaning, factor, got)


def check_same_rows(op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    got, wanted = tensor.shape[0], other.shape[0]
    condition = got == wanted
    if condition is not True:
        _check(condition, op, f"rows of {name}", "", f"those of {other_name}", wanted, got)


def _check(
    condition: bool | torch.SymBool, op: str, name: str, relation: str, meaning: str, limit: int, got: int
) -> None:
    if condition is True:  # in eager mode nothing is formatted unless it is needed
        return
    if condition is False:
        raise ValueError(f"{op}: {name} must be {relation}{meaning} = {limit}, got {got}")
    if torch.compiler.is_dynamo_compiling():  # where torch.export (strict) takes no message; ops show it theirs
        torch._check_value(condition)
    else:
        torch._check_value(condition, lambda: f"{op}: {name} must be {relation}{meaning} = {limit}, got {got}")


def check_choice(op: str, name: str, got: object, kind: type) -> None:
    if not isinstance(got, kind):
        raise TypeError(f"{op}: {name} must be a {kind.__name__}, got {got!r}")
