"""The plugin as vLLM finds it, and what a user can set."""

from importlib.metadata import entry_points
from typing import Any

import pytest
from vllm.model_executor.custom_op import op_registry_oot

from moe_ops import Dispatch, Strategy
from moe_ops.integrations import vllm as plugin
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
    given = {"strategy": "mc2", "dispatch": "all_to_all", "packed_payload": False}
    expected = Settings(Strategy.MC2, Dispatch.ALL_TO_ALL, False)
    assert read_settings({KEY: given}, {}) == expected
    environ = {f"MOE_OPS_VLLM_{name.upper()}": str(value).lower() for name, value in given.items()}
    assert read_settings({}, environ) == expected
    assert read_settings({KEY: {"strategy": "auto"}}, environ) == expected._replace(strategy=None)
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
    ],
)
def test_settings_that_are_not_known(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings({KEY: config}, {})
