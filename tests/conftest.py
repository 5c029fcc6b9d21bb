import os

os.environ.setdefault("KINETO_LOG_LEVEL", "5")

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

from .ranks import RankPool

settings.register_profile("moe_ops", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moe_ops")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    pools: dict[int, RankPool] = {}

    def pool_of(size: int) -> RankPool:
        if size not in pools or pools[size].is_broken:
            pools[size] = RankPool(size, str(tmp_path_factory.mktemp("ranks") / "store"))
        return pools[size]

    yield pool_of
    for pool in pools.values():
        pool.close()


@pytest.fixture
def ranks4(_pools: Callable[[int], RankPool]) -> RankPool:
    """Four real gloo ranks, shared by all tests of the session."""
    return _pools(4)


@pytest.fixture
def fake_group4() -> Iterator[str]:
    """The name of a fake process group of four ranks in this process, which is its rank 1: for shapes and tracing."""
    dist.init_process_group("fake", rank=1, world_size=4)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
