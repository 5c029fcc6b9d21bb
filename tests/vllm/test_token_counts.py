"""The op that reads vLLM's forward context."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.config import CompilationConfig, CompilationMode, VllmConfig
from vllm.forward_context import DPMetadata, create_forward_context, override_forward_context

from moe_ops.integrations.vllm.token_counts import read_token_counts, token_counts

COUNTS = [3, 0, 17]


def context(counts: list[int] | None) -> override_forward_context:
    metadata = None if counts is None else DPMetadata(torch.tensor(counts, dtype=torch.int32))
    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    return override_forward_context(create_forward_context(None, config, dp_metadata=metadata))


def test_the_counts_are_those_of_the_step() -> None:
    x = torch.zeros(3, 4)
    for counts in (COUNTS, [1, 2, 3]):
        with context(counts):
            assert list(token_counts(x, 3)) == counts


def test_the_fake_is_as_the_kernel_is() -> None:
    with context(COUNTS):
        torch.library.opcheck(read_token_counts, (torch.zeros(3, 4), 3))
        real = read_token_counts(torch.zeros(3, 4), 3)
    with FakeTensorMode():
        fake = read_token_counts(torch.zeros(3, 4), 3)
    assert (real.shape, real.dtype, real.device, real.stride()) == (fake.shape, fake.dtype, fake.device, fake.stride())


def test_what_is_read_is_a_copy() -> None:
    """The context's tensor is the engine's."""
    metadata = torch.tensor(COUNTS)
    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    with override_forward_context(create_forward_context(None, config, dp_metadata=DPMetadata(metadata))):
        read_token_counts(torch.zeros(3, 4), 3).zero_()
    assert metadata.tolist() == COUNTS


def test_one_graph_for_all_counts() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def rows(x: torch.Tensor) -> torch.Tensor:
        first, _, last = token_counts(x, 3)
        return x.new_zeros(first + 2 * last)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for counts in (COUNTS, [0, 0, 0], [1, 1, 1]):
            with context(counts):
                assert rows(torch.zeros(3, 4)).shape == (counts[0] + 2 * counts[2],)


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (None, RuntimeError, "must hold the token counts of 3 DP ranks, got None"),
        ([1, 2], ValueError, "must be of 3 DP ranks, got 2"),
    ],
)
def test_a_context_without_them(counts: list[int] | None, error: type[Exception], message: str) -> None:
    with context(counts), pytest.raises(error, match=message):
        token_counts(torch.zeros(3, 4), 3)
