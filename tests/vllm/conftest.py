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
