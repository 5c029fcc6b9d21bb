"""vLLM's caches of compiled code, shared by programs with the plugin and without."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from moe_ops.demo_vllm.environment import ENVIRONMENT, IN_PROCESS

from .program import PROMPTS

OPS = {
    "0": {"_C::cpu_fused_moe"},  # vLLM's kernel, which the plugin calls, too
    "1": {"_C::cpu_fused_moe", "moe_ops::route", "moe_ops::vllm_cpu_experts"},
}
TIMEOUT = 200


def run_programs(model: str, cache: Path) -> dict[str, Any]:
    """What a program without the plugin ("0") and one with it print, which run side by side."""
    environment = {
        **os.environ,
        **ENVIRONMENT,
        **IN_PROCESS,
        "VLLM_DISABLE_COMPILE_CACHE": "0",
        "VLLM_CACHE_ROOT": str(cache),
    }
    programs = {
        plugin: subprocess.Popen(
            [sys.executable, "-m", "tests.vllm.program", model],
            env={**environment, "MOE_OPS_VLLM": plugin},
            stdout=subprocess.PIPE,
            text=True,
        )
        for plugin in OPS
    }
    try:
        return {
            plugin: json.loads(run.communicate(timeout=TIMEOUT)[0].splitlines()[-1]) for plugin, run in programs.items()
        }
    finally:
        for run in programs.values():
            run.kill()


def test_a_warm_cache_never_mixes_them(qwen3: str, tmp_path: Path) -> None:
    """Each compiles into a directory of its own, and finds it again. vLLM 0.32 cannot load what it keeps of graphs for a CPU,
    with or without the plugin, and says so; Inductor's part of the cache is read."""
    for _ in ("cold", "warm"):
        found = run_programs(qwen3, tmp_path)
        assert {plugin: set(answer["ops"]) for plugin, answer in found.items()} == OPS
        assert found["0"]["tokens"] == found["1"]["tokens"]
        assert len(found["0"]["tokens"]) == len(PROMPTS)
        assert len(list((tmp_path / "torch_compile_cache" / "torch_aot_compile").iterdir())) == len(OPS)
