import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from .engines import Answer, Job, Result
from .models import write_model
from .ranks import EnginePool


@pytest.fixture(scope="session")
def engines() -> Iterator[EnginePool]:
    pool = EnginePool(4)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


class Stock:
    """What vLLM itself makes of a model, which is asked once: on one rank, unless more are needed."""

    def __init__(self, engines: EnginePool) -> None:
        self.run = cache(lambda *job: engines.run(Job(*job, plugin=False))[0])

    def __call__(self, model: str, prompts: Any, mode: str = "eager", tp: int = 1) -> list[Answer]:
        result: Result = self.run(model, (tuple(map(tuple, prompts)),), tp, 1, False, mode)
        return result.answers


@pytest.fixture(scope="session")
def stock(engines: EnginePool) -> Stock:
    return Stock(engines)


@pytest.fixture(scope="session")
def qwen3(models: Path) -> str:
    return str(write_model("qwen3", models))


@pytest.fixture(scope="module")
def vllm_groups() -> Iterator[None]:
    """vLLM's groups, of this process alone."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1, 1)
    yield
    cleanup_dist_env_and_memory()


@pytest.fixture
def config(vllm_groups: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """That of an engine in this process; the plugin is in vLLM."""
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
    from vllm.model_executor.custom_op import op_registry_oot

    from moe_ops.integrations.vllm.runner import install

    monkeypatch.delitem(op_registry_oot, "MoERunner", raising=False)
    install()
    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    with set_current_vllm_config(config):
        yield config
    op_registry_oot.pop("MoERunner", None)
