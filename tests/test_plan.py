"""`moe-ops plan`: what it prints, its exit status, its picture."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from moe_ops.cli import main
from moe_ops.cost_types import Topology
from moe_ops.plan.models import PRESETS, Model, read_config
from moe_ops.plan.plans import shard_routing

ROOT = Path(__file__).parents[1]
SMALL = ["--hidden-size", "64", "--intermediate-size", "32", "--num-experts", "8", "--top-k", "2"]
Captured = pytest.CaptureFixture[str]


def plan(capsys: Captured, *arguments: object) -> str:
    assert main(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refuse(capsys: Captured, *arguments: object) -> str:
    assert main(["plan", *map(str, arguments)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("moe-ops plan: ") and output.err.count("\n") == 1
    assert not re.match(r"moe-ops plan: \w+: ", output.err)  # one name is enough
    return output.err


def rows_of(output: str) -> dict[str, list[float]]:
    """What the lines of the first table name, and the numbers at their ends."""
    rows: dict[str, list[float]] = {}
    for line in output.splitlines():
        match = re.match(r"\s*(?:->)?\s*([A-Za-z2_(),: ]+?)\s+((?:[\d,.]+ *)+)$", line)
        if match:
            rows.setdefault(" ".join(match[1].split()), [float(cell.replace(",", "")) for cell in match[2].split()])
    return rows


def test_shows_every_form_its_collectives_and_the_choice(capsys: Captured) -> None:
    output = plan(capsys, "--model", "qwen3-235b-a22b", "--tp", 2, "--dp", 4, "--tokens", 6, "--device", "a2")
    rows = rows_of(output)
    # 4 DP ranks of 6 tokens, 8 EP ranks of 3 rows; bfloat16 rows of 8192 bytes, and 64 of ids and weights.
    assert rows["prepare: all_gather DP"] == [18, 18 * 8256, 18 * 8256, pytest.approx(20 + 18 * 8256 / 5e4, abs=0.05)]
    assert rows["finalize: reduce_scatter DP"][:2] == [18, 18 * 8192]
    assert rows["finalize: all_reduce TP"][:2] == [6, 6 * 8192]
    assert rows["ALLGATHER, DP form"][0] == 18 * 8256 + 24 * 8192
    assert rows["counts: all_to_all EP"][:2] == [7, 56]
    assert rows["MC2 FIXED_CAPACITY (or ALL2ALL)"][0] == 21 * 8256 + 21 * 8192 + 3 * 8192
    assert "ALL2ALL ALL_TO_ALL (or MC2)" in rows
    chosen = re.search(r"-> +(.*?)  ", output)
    assert chosen and f"Choice: {chosen[1].partition(' (')[0]}: least predicted time" in output
    seconds = [numbers[-1] for name, numbers in rows.items() if (name[0].isupper() and "_" in name) or "form" in name]
    assert len(seconds) == 3 and seconds == sorted(seconds)
    assert "vllm-ascend's rule for a2: ALLGATHER LOCAL: EP 8 is less than 16" in output
    assert "busiest rank" in output


def test_sharded_tokens_take_the_ep_form(capsys: Captured) -> None:
    options = [*SMALL, "--tp", 2, "--dp", 2, "--tokens", 5, "--sharded", "--quant", "w8a8"]
    rows = rows_of(plan(capsys, *options))
    # 3 rows a rank to each of 3 others; int8, a scale, two ids and weights: 64 + 4 + 16.
    assert rows["prepare: all_gather EP"][:2] == [9, 9 * 84]
    assert rows["finalize: reduce_scatter EP"][:2] == [9, 9 * 128]
    assert not any("TP" in name for name in rows)


def test_a_choice_that_can_be_captured(capsys: Captured) -> None:
    options = ["--model", "deepseek-v3", "--dp", 64, "--tokens", 64, "--latency-us", 0]
    assert "Choice: ALL2ALL ALL_TO_ALL" in plan(capsys, *options)
    output = plan(capsys, *options, "--capturable")
    assert "Choice: ALL2ALL" not in output and "ALL_TO_ALL cannot be captured" in output


def test_a_given_routing(capsys: Captured, tmp_path: Path) -> None:
    path = tmp_path / "ids.pt"
    torch.save(torch.tensor([[0, 1], [0, 7]]), path)  # the first stays on rank 0 of 2, or goes there
    output = plan(capsys, *SMALL, "--dp", 2, "--tokens", 4, "--routing", path)
    rows = rows_of(output)
    # Rank 0: 4 rows, of which 2 have expert 7 on rank 1. Rank 1: all 4 have expert 0 on rank 0.
    assert rows["dispatch: all_to_all EP"][0] == 4
    assert rows["ALL2ALL ALL_TO_ALL (or MC2)"][0] == 8 + max(2 * 144 + 4 * 128, 4 * 144 + 2 * 128)
    assert "busiest expert 4.00 times the mean (8 rows), busiest rank 1.50 times (12 rows" in output


def test_prints_what_the_docs_show(capsys: Captured) -> None:
    shown = re.search(r"```\n\$ moe-ops plan (.*?)\n(.*?)```", (ROOT / "docs/choosing.md").read_text(), re.DOTALL)
    assert shown
    printed = plan(capsys, *shown[1].split())
    assert [line.rstrip() for line in printed.splitlines()] == shown[2].splitlines()


def test_rows_of_the_ranks_are_chunks_of_their_groups() -> None:
    ids = torch.arange(6).view(6, 1)
    shards = shard_routing(ids, Topology(tp=2, dp=2), 3)
    assert shards.squeeze(2).tolist() == [[0, 1], [2, -1], [3, 4], [5, -1]]


CONFIGS = {
    "qwen3-235b-a22b": {"hidden_size": 4096, "moe_intermediate_size": 1536, "intermediate_size": 12288}
    | {"num_experts": 128, "num_experts_per_tok": 8},
    "deepseek-v3": {"hidden_size": 7168, "moe_intermediate_size": 2048, "intermediate_size": 18432}
    | {"n_routed_experts": 256, "num_experts_per_tok": 8},
    "mixtral-8x7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt-oss-120b": {"text_config": {"hidden_size": 2880, "intermediate_size": 2880}
    | {"num_local_experts": 128, "num_experts_per_tok": 4}},
}  # fmt: skip


@pytest.mark.parametrize("model", CONFIGS)
def test_configs_of_model_families(tmp_path: Path, model: str) -> None:
    assert read(tmp_path, CONFIGS[model] | {"model_type": "some"}) == PRESETS[model]._replace(name="some")


def read(folder: Path, config: object) -> Model:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return read_config(path)


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2}
PLAIN = Model("some", 64, 96, 8, 2)
CHANGES = {
    "latent": ({"moe_latent_size": 16}, {"hidden_size": 16}),
    "no-latent": ({"moe_latent_size": None}, {}),
    "projected": ({"moe_hidden_size": 32}, {"hidden_size": 32}),
    "dense-and-moe": ({"moe_intermediate_size": 24}, {"intermediate_size": 24}),
    "longcat": ({"expert_ffn_hidden_size": 24, "zero_expert_num": 0}, {"intermediate_size": 24}),
    "list-of-equal": ({"moe_intermediate_size": [24] * 3, "num_experts": [8, 8]}, {"intermediate_size": 24}),
    "two-names": ({"num_local_experts": 8, "moe_topk": [2, 2], "moe_k": 2, "top_k_experts": 2}, {}),
    "no-gate": ({"mlp_hidden_act": "relu2"}, {"matrices": 2}),
    "shared": ({"shared_expert_intermediate_size": 7, "n_shared_experts": 2, "share_expert_dim": 5}, {}),
    "others": ({"num_expert_group": 4, "moe_layer_freq": [0, 1], "router_hidden_size": 3, "moe_layers_enum": "1"}, {}),
    "layers-alike": ({"per_layer_config": {"3": {"head_dim": 9, "num_experts": 8}, "4": {}}}, {}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_keys_that_change_sizes(tmp_path: Path, name: str) -> None:
    keys, sizes = CHANGES[name]
    assert read(tmp_path, SIZES | keys | {"model_type": "some"}) == PLAIN._replace(**sizes)


WRONG = {
    "num_experts must be a positive integer, got True": {"num_experts": True},
    "hidden_size must be a positive integer, got '8'": {"hidden_size": "8"},
    "moe_latent_size must be a positive integer, got 0": {"moe_latent_size": 0},
    "moe_topk must be a positive integer, got [2, True]": {"moe_topk": [2, True]},
    "num_experts must be a positive integer, got []": {"num_experts": []},
    "moe_intermediate_size must be the same for all layers, got [24, 48]": {"moe_intermediate_size": [24, 48]},
    "num_local_experts must be 8, as num_experts is, got 16": {"num_local_experts": 16},
    "moe_k must be 2, as num_experts_per_tok is, got 4": {"moe_k": 4},
    "zero_expert_num must not be there, ": {"zero_expert_num": 256},
    "pyramid_num_routed must not be there, ": {"pyramid_num_routed": [4, 8]},
    "moe_ffn_hidden_size must not be there, ": {"moe_ffn_hidden_size": 24},
    "expert_dim must not be there, ": {"expert_dim": 24},
    "is_moe must not be there, ": {"is_moe": False},
    "per_layer_config must leave the sizes of experts as they are, got {'num_experts': 4}": {
        "per_layer_config": {"1": {"head_dim": 9}, "3": {"num_experts": 4}}
    },
    "per_layer_config must be objects, one for each layer, got 5": {"per_layer_config": 5},
    "per_layer_config must be objects, one for each layer, got [None]": {"per_layer_config": {"0": None}},
    "expert_intermediate must not be there, ": {"expert_intermediate": 24},
    "experts_per_token must not be there, ": {"experts_per_token": 2},
    "expertHiddenSize must not be there, ": {"expertHiddenSize": 24},
    "expert_width must not be there, ": {"per_layer_config": [{"expert_width": 4}]},
    "must have moe_latent_size or moe_hidden_size or hidden_size, which is missing": {"hidden_size": None},
    "must have num_experts_per_tok or ": {"num_experts_per_tok": None},
}


@pytest.mark.parametrize("message", WRONG)
def test_configs_that_are_refused(capsys: Captured, tmp_path: Path, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SIZES | WRONG[message]))
    assert message in refuse(capsys, "--config", path)


def test_files_that_are_no_configs(capsys: Captured, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert "No such file" in refuse(capsys, "--config", path)
    for text, message in {"{": "must be JSON, got", "[]": "must be a JSON object, got list"}.items():
        path.write_text(text)
        assert message in refuse(capsys, "--config", path)


EXPERTS = {
    "afmoe": "Afmoe",
    "axk1": "AXK1",
    "deepseek_v3": "DeepseekV3",
    "ernie4_5_moe": "Ernie4_5_Moe",
    "granitemoe": "GraniteMoe",
    "hunyuan_v1_moe": "HunYuanMoEV1",
    "minimax_m2": "MiniMaxM2",
    "mixtral": "Mixtral",
    "nemotron_h": "NemotronH",
    "qwen3_moe": "Qwen3Moe",
}


@pytest.mark.parametrize("family", EXPERTS)
def test_sizes_are_those_of_the_experts_of_transformers(tmp_path: Path, family: str) -> None:
    prefix = EXPERTS[family]
    changes = {"moe_latent_size": 1024} if family == "nemotron_h" else {}
    config = getattr(import_module(f"transformers.models.{family}.configuration_{family}"), f"{prefix}Config")(
        **changes
    )
    make = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), f"{prefix}Experts")
    with torch.device("meta"):
        up, down = make(config).parameters()
    config.save_pretrained(tmp_path)
    model = read_config(tmp_path / "config.json")
    assert down.shape == (model.num_experts, model.hidden_size, model.intermediate_size)
    assert up.shape == (model.num_experts, (model.matrices - 1) * model.intermediate_size, model.hidden_size)
    assert model.top_k == config.num_experts_per_tok


def test_rows_are_as_wide_as_what_experts_take(capsys: Captured, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    sizes = {"hidden_size": 4096, "moe_latent_size": 1024, "moe_intermediate_size": 2688}
    path.write_text(json.dumps(sizes | {"n_routed_experts": 512, "num_experts_per_tok": 22, "mlp_hidden_act": "relu2"}))
    output = plan(capsys, "--config", path, "--dp", 8, "--tokens", 64)
    rows = rows_of(output)
    assert rows["finalize: reduce_scatter DP"][:2] == [7 * 64, 7 * 64 * 2 * 1024]  # 917,504
    assert "64 experts a rank, 352 million weights" in output  # 2 * 64 * 1024 * 2688


REFUSED = {
    "must be given by --model, --config or its four sizes, got none of them": [],
    "must be given by --model, --config or its four sizes, got --model, --top-k": "--model deepseek-v3 --top-k 8",
    "all four sizes must be given, got no --num-experts, --top-k": "--hidden-size 8 --intermediate-size 8",
    "plan: num_experts must be a multiple of EP = 3, got 8": [*SMALL, "--dp", "3"],
    "plan: num_tokens must be at least 0, got -1": [*SMALL, "--tokens", "-1"],
    "plan: tp must be at least 1, got 0": [*SMALL, "--tp", "0"],
    "zipf:EXPONENT must have an exponent of 0 or more, got zipf:-1": [*SMALL, "--routing", "zipf:-1"],
    "zipf:EXPONENT must have an exponent of 0 or more, got zipf:x": [*SMALL, "--routing", "zipf:x"],
    "No such file or directory: 'zipf'": [*SMALL, "--routing", "zipf"],
    "--bandwidth-gbps must be more than 0, got 0": [*SMALL, "--bandwidth-gbps", "0"],
    "--latency-us must be 0 or more, got nan": [*SMALL, "--latency-us", "nan"],
    "--calibrate must be 2 ranks or more, got 1": [*SMALL, "--calibrate", "1"],
    "--calibrate measures what --latency-us and --bandwidth-gbps say": [
        *SMALL,
        "--calibrate",
        "2",
        "--latency-us",
        "1",
    ],
    "--mc2-capacity must go with --device, got 8 without it": [*SMALL, "--mc2-capacity", "8"],
    "--mc2-capacity must be 0 or more, got -1": [*SMALL, "--mc2-capacity", "-1", "--device", "a2"],
    "--plot must end in one of .": [*SMALL, "--plot", "plan.nothing"],
    "must end in one of ": [*SMALL, "--plot", "plan"],
    "--plot must be in a directory that exists, got no/such/plan.png": [*SMALL, "--plot", "no/such/plan.png"],
    "--intermediate-size must be at least 1, got 0": [*SMALL, "--intermediate-size", "0"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(capsys: Captured, message: str) -> None:
    arguments = REFUSED[message]
    assert message in refuse(capsys, *(arguments.split() if isinstance(arguments, str) else arguments))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.int32), r"must hold topk_ids [tokens, 2], got (3, 4)"),
        (torch.zeros(0, 2, dtype=torch.int32), r"must hold topk_ids [tokens, 2], got (0, 2)"),
        (torch.zeros(3, 2), "must hold int32 or int64, got torch.float32"),
        (torch.tensor([[0, 8]]), "must hold ids in [-1, 8), got 0 to 8"),
        ([1, 2], "must hold topk_ids [tokens, 2], got list"),
        (None, "must be a tensor saved by torch.save, got"),
    ],
    ids=str,
)
def test_refuses_routings(capsys: Captured, tmp_path: Path, saved: object, message: str) -> None:
    path = tmp_path / "ids.pt"
    if saved is None:
        path.write_text("no tensor")
    else:
        torch.save(saved, path)
    assert message in refuse(capsys, *SMALL, "--routing", path)


def test_draws(capsys: Captured, tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    options = [*SMALL, "--dp", 2, "--tokens", 1, 16, 256]
    assert f"Drawn: {path}" in plan(capsys, *options, "--plot", path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10000


def test_no_tokens_and_one_rank(capsys: Captured, tmp_path: Path) -> None:
    output = plan(capsys, *SMALL, "--tokens", 0, "--plot", tmp_path / "plan.png", "--device", "310p")
    assert "Choice: ALLGATHER, DP form: nothing is sent" in output
    assert "rule for 310p: ALLGATHER LOCAL: no expert parallelism" in output
    assert rows_of(plan(capsys, *SMALL, "--tokens", 0, "--tp", 2))["dispatch: all_to_all EP"] == [0, 0, 0, 20]


@pytest.mark.slow
def test_measures_on_this_machine() -> None:
    command = [sys.executable, "-m", "moe_ops.cli", "plan", *SMALL, "--dp", "2", "--tokens", "8", "--calibrate", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.search(r"all_gather: \d+ us \+ bytes / \S+ Gb/s; .*measured on 2 gloo ranks", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "options", "extra"), [("rich", [], "plan"), ("matplotlib", ["--plot", "x"], "plot")]
)
def test_says_what_to_install(package: str, options: list[str], extra: str) -> None:
    arguments = ["plan", *SMALL, *options]
    code = f"import sys; sys.modules['{package}'] = None; from moe_ops.cli import main; sys.exit(main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"pip install moe-ops[{extra}]" in done.stderr
