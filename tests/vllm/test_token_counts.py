"""The op that reads vLLM's forward context."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.config import CompilationConfig, CompilationMode, VllmConfig
from vllm.forward_context import DPMetadata, create_forward_context, override_forward_context

from moe_ops.integrations.vllm.token_counts import read_token_counts, token_counts

COUNTS = [3, 0, 17]
FIRST_OF_3 = 3, 0, 1  # DP size and rank, shards


def context(counts: list[int] | None) -> override_forward_context:
    metadata = None if counts is None else DPMetadata(torch.tensor(counts, dtype=torch.int32))
    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    return override_forward_context(create_forward_context(None, config, dp_metadata=metadata))


@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 3, 7, 64, 257]), min_size=2, max_size=4),
    num_shards=st.sampled_from([1, 2, 3]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_the_counts_are_those_of_the_step(counts: list[int], num_shards: int, data: st.DataObject) -> None:
    """Whichever share of its DP rank's tokens a rank has."""
    rank = data.draw(st.integers(0, len(counts) - 1))
    rows = -(-counts[rank] // num_shards)
    with context(counts):
        assert list(token_counts(torch.zeros(rows, 4), len(counts), rank, num_shards)) == counts
        with pytest.raises(ValueError, match=r"token counts .* must be"):
            token_counts(torch.zeros(rows + 1, 4), len(counts), rank, num_shards)


def test_one_dp_rank_has_its_own() -> None:
    """vLLM keeps no counts then."""
    with context(None):
        assert list(token_counts(torch.zeros(5, 4), 1, 0, 1)) == [5]
        assert list(token_counts(torch.zeros(3, 4), 1, 0, 2)) == [6]


def test_the_fake_agrees_with_the_kernel() -> None:
    with context(COUNTS):
        torch.library.opcheck(read_token_counts, (torch.zeros(3, 4), *FIRST_OF_3))
        real = read_token_counts(torch.zeros(3, 4), *FIRST_OF_3)
    with FakeTensorMode():
        fake = read_token_counts(torch.zeros(3, 4), *FIRST_OF_3)
    assert (real.shape, real.dtype, real.device, real.stride()) == (fake.shape, fake.dtype, fake.device, fake.stride())


def test_what_is_read_is_a_copy() -> None:
    """The context's tensor is the engine's."""
    metadata = torch.tensor(COUNTS)
    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    with override_forward_context(create_forward_context(None, config, dp_metadata=DPMetadata(metadata))):
        read_token_counts(torch.zeros(3, 4), *FIRST_OF_3).zero_()
    assert metadata.tolist() == COUNTS


def test_one_graph_for_all_counts() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def rows(x: torch.Tensor) -> torch.Tensor:
        first, _, last = token_counts(x, *FIRST_OF_3)
        return x.new_zeros(first + 2 * last)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for counts in (COUNTS, [3, 0, 0], [3, 1, 1]):
            with context(counts):
                assert rows(torch.zeros(3, 4)).shape == (counts[0] + 2 * counts[2],)


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (None, RuntimeError, "must hold the token counts of 3 DP ranks, got None"),
        ([1, 2], ValueError, "must be of 3 DP ranks, got 2"),
        ([4, 3, 3], ValueError, r"token counts \[4, 3, 3\] must be 3 \* 1 for DP rank 0"),
    ],
)
def test_a_context_without_them(counts: list[int] | None, error: type[Exception], message: str) -> None:
    with context(counts), pytest.raises(error, match=message):
        token_counts(torch.zeros(3, 4), *FIRST_OF_3)
