"""The demo: it shows a row for every form and count, and fails when anything disagrees."""

import io
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from moe_ops.cli import main
from moe_ops.demo import run
from moe_ops.demo.cases import FORMS, Family
from moe_ops.demo.families import build_families
from moe_ops.demo.ranks import Measurement, relative_error
from moe_ops.demo.report import find_failures, make_table

ROOT = Path(__file__).parents[1]
NAMES = {"ALL2ALL ragged", "ALL2ALL fixed", "MC2 fixed", "ALLGATHER DP", "ALLGATHER EP"}
ROW = re.compile(r"(\S+ (?:ragged|fixed|DP|EP)) (\d+) (\d+) (\d+) (\d+) (\S+) (\d+) (\d+) (\S+) (\S+)")


def rows_of(output: str) -> list[tuple[str, ...]]:
    lines = (" ".join(line.split()) for line in output.splitlines())
    return [match.groups() for line in lines if (match := ROW.fullmatch(line))]


def run_on_ranks(family: Family) -> tuple[int, str]:
    output = io.StringIO()
    status = run.run_families([family], backend="eager", console=Console(file=output, width=120))
    return status, output.getvalue()


@pytest.fixture(scope="module")
def families() -> dict[torch.dtype, list[Family]]:
    return {dtype: build_families(dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.fixture
def qwen3(families: dict[torch.dtype, list[Family]]) -> Family:
    return families[torch.float32][0]


@pytest.mark.slow
def test_shows_every_form_and_count_of_a_family(families: dict[torch.dtype, list[Family]]) -> None:
    deepseek = families[torch.float32][2]
    status, output = run_on_ranks(deepseek)
    assert status == 0, output
    assert "All 25 calls agree" in output
    rows = rows_of(output)
    assert {row[0] for row in rows} == NAMES
    for form in NAMES - {"ALLGATHER EP"}:
        counts = [[int(count) for count in row[1:5]] for row in rows if row[0] == form]
        for rank in range(4):  # replicated over TP: ranks 0 and 1 are one DP rank, 2 and 3 the other
            assert sorted(of_rank[rank] for of_rank in counts) == [0, 1, 3, 64, 257]
        assert all(a == b != c == d for a, b, c, d in counts)
    assert {row[6] for row in rows} == {"1"}
    assert all(float(row[5]) < 1e-5 for row in rows)
    assert all(int(row[8].replace(",", "")) > 0 for row in rows)


@pytest.mark.slow
def test_the_command_runs_all_families_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run_families(families: list[Family], *, backend: str, console: Console) -> int:
        asked.append(([family.name for family in families], families[0].experts.w2.dtype, backend))
        return 3

    monkeypatch.setattr(run, "run_families", run_families)
    assert main(["demo", "--backend", "aot_eager", "--dtype", "bfloat16"]) == 3
    assert main(["demo"]) == 3
    names = ["Qwen3-MoE", "Mixtral", "DeepSeek-V3"]
    assert asked == [(names, torch.bfloat16, "aot_eager"), (names, torch.float32, "inductor")]


@pytest.mark.slow
def test_sharded_cases_spread_the_same_tokens(qwen3: Family) -> None:
    for whole, spread in zip(qwen3.replicated, qwen3.sharded, strict=True):
        for dp in range(2):
            torch.testing.assert_close(torch.cat(spread.tokens[2 * dp : 2 * dp + 2]), whole.tokens[2 * dp])
            torch.testing.assert_close(torch.cat(spread.expected[2 * dp : 2 * dp + 2]), whole.expected[2 * dp])


@pytest.mark.slow
def test_one_wrong_value_on_one_rank_fails(families: dict[torch.dtype, list[Family]]) -> None:
    """In bfloat16: the forms whose expected values were left alone agree."""
    mixtral = families[torch.bfloat16][1]
    (case,) = mixtral.sharded[1:2]
    expected = [values.clone() for values in case.expected]
    expected[3][0, 0] += 1
    status, output = run_on_ranks(
        mixtral._replace(replicated=mixtral.replicated[1:2], sharded=[case._replace(expected=expected)])
    )
    assert status == 1
    assert "WRONG" in output
    assert "failures: 1 " in output


@pytest.mark.slow
def test_a_rank_that_raises_fails_and_does_not_hang(qwen3: Family, capfd: pytest.CaptureFixture[str]) -> None:
    too_few = qwen3.experts._replace(w13=qwen3.experts.w13[:14], w2=qwen3.experts.w2[:14])  # rank 3 lacks two
    status, _ = run_on_ranks(qwen3._replace(experts=too_few))
    assert status == 1
    assert "failed" in capfd.readouterr().err


def perfect_measurements(family: Family) -> list[Measurement]:
    perfect = {"error": 0.0, "graphs": 1, "collectives": 3, "bytes_sent": 9, "seconds": 0.1}
    cases = [(form, index) for form in FORMS for index in range(5) for _ in range(4)]
    return [Measurement(family.name, form, index, **perfect) for form, index in cases]


@pytest.mark.slow
@pytest.mark.parametrize("flaw", [{"error": 1e-4}, {"error": math.inf}, {"graphs": 2}, {"graphs": 0}, None], ids=str)
def test_one_flaw_on_one_rank_is_a_failure(qwen3: Family, flaw: dict[str, float] | None) -> None:
    measurements = perfect_measurements(qwen3)
    assert find_failures([qwen3], measurements) == []
    last = measurements.pop()
    if flaw:
        measurements.append(last._replace(**flaw))
    assert len(find_failures([qwen3], measurements)) == 1
    make_table(qwen3, measurements)


def test_relative_error_accepts_no_other_shape_dtype_or_nan() -> None:
    expected = torch.tensor([[1.0, -4.0]], dtype=torch.float64)
    assert relative_error(torch.tensor([[2.0, -4.0]]), expected, torch.float32) == 0.25
    assert relative_error(torch.tensor([[math.nan, -4.0]]), expected, torch.float32) == math.inf
    assert relative_error(torch.ones(2, 2), expected, torch.float32) == math.inf
    assert relative_error(torch.ones(1, 2), expected, torch.bfloat16) == math.inf
    assert relative_error(torch.ones(0, 2), expected[:0], torch.float32) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("command", "package", "extra"), [("demo", "rich", "demo"), ("demo-vllm", "vllm", "vllm")])
def test_says_what_to_install(command: str, package: str, extra: str) -> None:
    without = (
        f"import sys; sys.modules[{package!r}] = None; from moe_ops.cli import main; sys.exit(main([{command!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", without], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"pip install moe-ops[{extra}]" in done.stderr
