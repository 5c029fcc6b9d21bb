"""The lowerings of what quantises and routes over kernels that do what the vendor's pages say, beside the portable ones.

What passes here, and in the files for experts, exchange and stage, is right on a device whose kernels do what their pages say.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

import moe_ops as mo
from fake_impls.route import RouteSettings
from moe_ops import Quant

from .documented import FLOATS, HALVES
from .documented_chip import A5, lowered, portable

SEEDS = st.integers(0, 2**32)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def draw_rows(seed: int, num_rows: int, hidden: int, dtype: torch.dtype, spread: float) -> torch.Tensor:
    """Finite rows of many magnitudes, some of them zero, and the first of zeros alone."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, hidden, generator=generator)
    x = x * 2.0 ** ((torch.rand(x.shape, generator=generator) - 0.5) * spread)
    x[torch.rand(x.shape, generator=generator) < 0.1] = 0
    if seed % 3 == 0:
        x[:1] = 0
    return x.to(dtype)


class TestQuantize:
    """Zeros aside, of which pages say nothing but that they are zeros times any scale, bytes are the same."""

    @given(
        num_rows=st.integers(0, 5),
        hidden=st.integers(1, 70),
        dtype=st.sampled_from(HALVES),
        spread=st.sampled_from([0, 6, 20]),
        seed=SEEDS,
    )
    @settings(max_examples=100)
    def test_int8(self, num_rows: int, hidden: int, dtype: torch.dtype, spread: float, seed: int) -> None:
        x = draw_rows(seed, num_rows, hidden, dtype, spread)
        found, found_scale = lowered("quantize_int8", x, op="npu_dynamic_quant")
        expected, scale = portable("quantize_int8", x)
        assert torch.equal(found_scale, scale)
        assert torch.equal(found[scale > 0], expected[scale > 0])

    @pytest.mark.parametrize("quant", [Quant.MXFP8, Quant.MXFP4], ids=lambda quant: quant.value)
    @given(
        num_rows=st.integers(0, 5),
        hidden=st.integers(1, 140),
        dtype=st.sampled_from(FLOATS),
        spread=st.sampled_from([0, 6, 20]),
        seed=SEEDS,
    )
    @settings(max_examples=100)
    def test_mx(self, quant: Quant, num_rows: int, hidden: int, dtype: torch.dtype, spread: float, seed: int) -> None:
        assume(hidden >= 32 or dtype is not torch.float32)
        hidden += hidden % 2 if quant is Quant.MXFP4 else 0
        x = draw_rows(seed, num_rows, hidden, dtype, spread)
        name = f"quantize_{quant.value}"
        found, found_scale = lowered(name, x, chip=A5, op="npu_dynamic_mx_quant")
        expected, scale = portable(name, x)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert (found_scale.dtype, found_scale.shape) == (scale.dtype, scale.shape)
        is_zero = torch.stack([(block == 0).all(dim=1) for block in x.split(32, dim=1)], dim=1)
        assert torch.equal(as_bytes(found_scale)[~is_zero], as_bytes(scale)[~is_zero])
        values = mo.dequantize_activations(found, found_scale, quant=quant, hidden_size=hidden)
        assert torch.equal(values, mo.dequantize_activations(expected, scale, quant=quant, hidden_size=hidden))


@given(
    num_rows=st.integers(0, 5),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    renormalize=st.booleans(),
    num_experts=st.sampled_from([16, 64]),
    groups=st.sampled_from([(1, 1), (4, 2), (2, 1), (4, 4)]),
    top_k=st.integers(1, 8),
    has_bias=st.booleans(),
    factor=st.sampled_from([1.0, 2.5]),
    has_padding=st.booleans(),
    has_nan=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=SEEDS,
)
@settings(max_examples=200)
def test_route(
    num_rows: int,
    scoring: str,
    renormalize: bool,
    num_experts: int,
    groups: tuple[int, int],
    top_k: int,
    has_bias: bool,
    factor: float,
    has_padding: bool,
    has_nan: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """No ties, of which the page says nothing; rows that are padding hold NaN, of which it does not say how it is ranked. Other
    rows with NaN choose experts, whichever, and weigh them NaN."""
    assume(top_k <= num_experts // groups[0] * groups[1])
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(num_experts, generator=generator) for _ in range(num_rows)]
    logits = torch.stack([*order, order[0]] if order else [torch.zeros(num_experts)])[:num_rows] / 16 - 2
    bias = torch.randn(num_experts, generator=generator) if has_bias else None
    assume(not has_bias or has_gaps(logits, bias, scoring, groups[0]))
    is_active = torch.rand(num_rows, generator=generator) < 0.7 if has_padding else None
    is_nan = torch.rand(num_rows, generator=generator) < 0.3 * has_nan
    logits[is_nan, 3] = torch.nan
    if is_active is not None:
        logits[~is_active] = torch.nan
        is_nan &= is_active
    arguments = logits.to(dtype), is_active, *RouteSettings(top_k, scoring, renormalize, *groups, bias, factor)
    weights, ids = lowered("route", *arguments, op="npu_moe_gating_top_k")
    expected_weights, expected_ids = portable("route", *arguments)
    assert ids.dtype is torch.int32 and weights.dtype is torch.float32
    assert torch.equal(ids[~is_nan], expected_ids[~is_nan])
    torch.testing.assert_close(weights[~is_nan], expected_weights[~is_nan])
    assert all(set(row) <= set(range(num_experts)) and len(set(row)) == top_k for row in ids[is_nan].tolist())
    assert weights[is_nan].isnan().all()


def has_gaps(logits: torch.Tensor, bias: torch.Tensor, scoring: str, num_groups: int) -> bool:
    """Whether no two choices, or groups, are so near each other that rounding may order them."""
    scores = torch.softmax(logits.double(), dim=1) if scoring == "softmax" else torch.sigmoid(logits.double())
    choice = scores + bias
    best = choice.unflatten(1, (num_groups, -1)).topk(2, dim=2).values.sum(dim=2)
    return all((ranked.sort(dim=1).values.diff(dim=1) > 1e-5).all() for ranked in (choice, best))


def draw_ids(seed: int, num_rows: int, top_k: int, num_experts: int) -> torch.Tensor:
    """Different experts in each row, and some of them nowhere."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_rows, num_experts, generator=generator).argsort(dim=1)[:, :top_k]
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -1)


CARRIED = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.float8_e8m0fnu,
    "int64": torch.int64,
}


@given(
    num_rows=st.integers(0, 9),
    top_k=st.integers(1, 4),
    first=st.sampled_from([0, 3]),
    local=st.sampled_from([1, 2, 8]),
    dtypes=st.lists(st.sampled_from(sorted(CARRIED)), min_size=1, max_size=3),
    has_scale=st.booleans(),
    twice=st.booleans(),
    ids_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=SEEDS,
)
@settings(max_examples=200)
def test_permute_by_expert(
    num_rows: int,
    top_k: int,
    first: int,
    local: int,
    dtypes: list[str],
    has_scale: bool,
    twice: bool,
    ids_dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = draw_ids(seed, num_rows, top_k, 11).to(ids_dtype)
    tensors = [torch.randint(0, 100, (num_rows, 16), generator=generator, dtype=torch.uint8) for _ in dtypes]
    tensors = [tensor.view(CARRIED[name]) for tensor, name in zip(tensors, dtypes, strict=True)]
    if has_scale:  # of each row one
        tensors.append(torch.rand(num_rows, generator=generator))
    if twice:
        tensors.append(tensors[0])
    arguments = tensors, ids, first, local
    *rows, counts, positions = lowered("permute_by_expert", *arguments, op="npu_moe_init_routing_v2")
    *expected_rows, expected_counts, expected_positions = portable("permute_by_expert", *arguments)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(positions, expected_positions)
    used = int(counts.sum())
    assert len({id(found) for found in rows}) == len(rows)
    for found, expected in zip(rows, expected_rows, strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(as_bytes(found[:used]), as_bytes(expected[:used]))


@given(
    num_rows=st.integers(0, 9),
    top_k=st.integers(1, 4),
    hidden=st.sampled_from([1, 8, 33]),
    special=st.sampled_from([0.0, torch.inf, torch.nan]),
    dtype=st.sampled_from(FLOATS),
    seed=SEEDS,
)
@settings(max_examples=150)
def test_unpermute(num_rows: int, top_k: int, hidden: int, special: float, dtype: torch.dtype, seed: int) -> None:
    """Rows that no choice went to, and weights of choices that went nowhere, may hold NaN. What is not finite in a row that is
    used stays in the result of the one row that chose it."""
    generator = torch.Generator().manual_seed(seed)
    num_choices = num_rows * top_k
    positions = torch.randperm(num_choices, generator=generator).view(num_rows, top_k)
    positions[torch.rand(positions.shape, generator=generator) < 0.3] = -1
    rows = torch.full((num_choices, hidden), torch.nan)
    used = positions[positions >= 0]
    rows[used] = torch.randn(len(used), hidden, generator=generator)
    rows[used[:1]] = special
    weights = torch.rand(num_rows, top_k, generator=generator).masked_fill(positions < 0, torch.nan)
    arguments = rows.to(dtype), weights, positions
    found = lowered("unpermute", *arguments, op="npu_moe_finalize_routing" if num_rows else None)
    expected = portable("unpermute", *arguments)
    assert found.dtype is dtype
    assert found.isfinite().all(dim=1).sum() >= num_rows - (special != 0)
    torch.testing.assert_close(found, expected, equal_nan=True)
