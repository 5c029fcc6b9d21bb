import importlib.util
import os

os.environ.setdefault("KINETO_LOG_LEVEL", "5")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks talk over the loopback interface alone
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or each rank starts a pool of compilers
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # or torch imports torch_npu before what it stands on

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

from .ranks import RankPool, pool_of_ranks

# What has an environment of its own.
collect_ignore = [
    path for path, package in {"npu": "torch_npu", "vllm": "vllm"}.items() if not importlib.util.find_spec(package)
]

settings.register_profile("moe_ops", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moe_ops")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    yield from pool_of_ranks(1, tmp_path_factory)


@pytest.fixture(scope="session")
def ranks2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    yield from pool_of_ranks(2, tmp_path_factory)


@pytest.fixture(scope="session")
def ranks4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four real gloo ranks, shared by all tests of the session."""
    yield from pool_of_ranks(4, tmp_path_factory)


@pytest.fixture
def fake_group4() -> Iterator[str]:
    """The name of a fake process group of four ranks in this process, which is its rank 1: for shapes and tracing."""
    dist.init_process_group("fake", rank=1, world_size=4)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
