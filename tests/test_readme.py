"""The example of the README, run as it is printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_layer_runs_and_prints_what_the_readme_says(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    example = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "def layer" in block)
    (tmp_path / "layer.py").write_text(example)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "layer.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    said = re.search(r"prints `(.*?)`", readme)
    assert said
    assert done.stdout.strip() == said[1]


@pytest.mark.slow
def test_import_leaves_out_what_only_some_users_need() -> None:
    later = ("torch._dynamo", "torch._inductor", "sympy", "torch_npu", "vllm", "transformers", "rich")
    code = f"import sys, moe_ops; print([name for name in {later} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_library_needs_torch_alone() -> None:
    others = ["rich", "transformers", "torchao", "hypothesis", "matplotlib", "pytest", "torch_npu", "vllm"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({others})); import moe_ops, fake_impls; print(moe_ops.prepare)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
