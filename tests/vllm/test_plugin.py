"""The plugin as vLLM finds it, and what a user can set."""

from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

from moe_ops import Dispatch, Group, ParallelGroups, Strategy
from moe_ops.integrations import vllm as plugin
from moe_ops.integrations.vllm import plans
from moe_ops.integrations.vllm.routing import _slots
from moe_ops.integrations.vllm.settings import KEY, Settings, read_settings


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """vLLM's, without what other tests left there."""
    monkeypatch.delitem(op_registry_oot, "MoERunner", raising=False)
    return op_registry_oot


def test_vllm_finds_the_plugin() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="moe_ops")
    assert found.load() is plugin.register


@pytest.mark.parametrize("value", [None, "", "0"])
def test_it_is_off_unless_asked_for(
    registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv(plugin.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(plugin.VARIABLE, value)
    plugin.register()
    assert "MoERunner" not in registry


def test_a_second_time_changes_nothing(registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "1")
    plugin.register()
    runner = registry["MoERunner"]
    plugin.register()
    assert registry["MoERunner"] is runner


def test_another_runner_is_not_replaced(registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "1")
    registry["MoERunner"] = object
    with pytest.raises(RuntimeError, match="MoERunner must not be replaced by another plugin, got object"):
        plugin.register()


def test_another_version_of_vllm_is_an_error(registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "1")
    monkeypatch.setattr("vllm.__version__", "0.33.1")
    with pytest.raises(RuntimeError, match=r"MOE_OPS_VLLM=1 needs vllm 0\.32\.\*, got 0\.33\.1"):
        plugin.register()
    assert "MoERunner" not in registry


def test_a_variable_that_is_neither_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "yes")
    with pytest.raises(ValueError, match="MOE_OPS_VLLM must be 0 or 1, got 'yes'"):
        plugin.register()


def test_settings() -> None:
    assert read_settings({}, {}) == Settings(Strategy.ALLGATHER, None, True)
    given = {"strategy": "auto", "dispatch": "all_to_all", "packed_payload": False}
    expected = Settings(None, Dispatch.ALL_TO_ALL, False)
    assert read_settings({KEY: given}, {}) == expected
    environ = {f"MOE_OPS_VLLM_{name.upper()}": str(value).lower() for name, value in given.items()}
    assert read_settings({}, environ) == expected
    assert (
        read_settings({KEY: {"strategy": "mc2", "packed_payload": True}}, {"MOE_OPS_VLLM_DISPATCH": ""}).dispatch
        is None
    )
    assert read_settings({KEY: expected.to_json()}, {}) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"strategy": "fast"}, r"strategy must be one of \['auto', 'all2all', 'mc2', 'allgather'\], got 'fast'"),
        ({"dispatch": "local"}, r"dispatch must be one of \['auto', 'all_to_all', 'fixed_capacity'\], got 'local'"),
        ({"packed_payload": "no"}, "packed_payload must be one of .*, got 'no'"),
        (
            {"strategies": "mc2"},
            r"must have keys of \['dispatch', 'packed_payload', 'strategy'\], got \['strategies'\]",
        ),
        ("mc2", "must be a mapping, got 'mc2'"),
        ({"strategy": ["mc2"]}, r"strategy must be one of .*, got \['mc2'\]"),
        ({"packed_payload": 1.0}, "packed_payload must be one of .*, got 1.0"),
        ({"dispatch": "fixed_capacity"}, "dispatch must be 'auto' with strategy 'allgather', got 'fixed_capacity'"),
        ({"strategy": "mc2", "packed_payload": False}, "packed_payload must be true with strategy 'mc2', got false"),
    ],
)
def test_settings_that_are_not_known(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings({KEY: config}, {})


def test_the_dispatch_of_the_user_goes_with_the_strategy_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    selection = SimpleNamespace(strategy=Strategy.ALL2ALL, dispatch=Dispatch.ALL_TO_ALL, reason="")
    monkeypatch.setattr(plans, "select_strategy", lambda *_, **__: selection)
    monkeypatch.setattr(plans, "_calibration", lambda *_: None)
    groups = ParallelGroups(tp=Group("tp", 2, 0), ep=Group("ep", 2, 0))
    config = SimpleNamespace(
        skip_final_all_reduce=False,
        hidden_dim=64,
        num_experts=8,
        experts_per_token=2,
        in_dtype=torch.float32,
        is_sequence_parallel=False,
    )
    engine = SimpleNamespace(
        device_config=SimpleNamespace(device=torch.device("cpu")), scheduler_config=SimpleNamespace(max_num_seqs=4)
    )
    for dispatch, expected in ((None, Dispatch.ALL_TO_ALL), (Dispatch.FIXED_CAPACITY, Dispatch.FIXED_CAPACITY)):
        found = plans._choose(config, Settings(None, dispatch, True), engine, groups)
        assert found[:2] == (Strategy.ALL2ALL, expected)


@pytest.mark.parametrize(("num_experts", "ranks"), [(8, 2), (8, 4), (12, 3)])
def test_experts_that_are_dealt_in_turn_are_where_vllm_puts_them(num_experts: int, ranks: int) -> None:
    manager = SimpleNamespace(placement_strategy="round_robin", global_num_experts=num_experts, ep_size=ranks)
    slots = _slots(manager)
    assert slots is not None
    for rank in range(ranks):
        _, expert_map, _ = determine_expert_map(ranks, rank, num_experts, "round_robin")
        for expert, local in enumerate(expert_map.tolist()):
            if local >= 0:
                assert slots[expert] == rank * (num_experts // ranks) + local
