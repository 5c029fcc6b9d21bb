"""Which layers are left to vLLM, and what tells compiled code apart."""

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.model_executor.custom_op import op_registry_oot

from moe_ops.integrations.vllm.runner import MoeOpsRunner, _with_key
from moe_ops.integrations.vllm.settings import KEY, read_settings
from moe_ops.integrations.vllm.support import why_not

from .layers import call, inputs, make_layer, pack

REASONS: dict[str, tuple[Callable[[Any, VllmConfig], Any], str]] = {
    "quantised": (
        lambda layer, _: setattr(layer.routed_experts, "quant_method", torch.nn.Module()),
        r"quantised \(Module\)",
    ),
    "dtype": (
        lambda layer, _: setattr(layer.routed_experts, "params_dtype", torch.float64),
        "weights are torch.float64",
    ),
    "limit": (lambda layer, _: setattr(layer.routed_experts, "swiglu_limit", 5.0), r"SwiGLU are \(5.0, None, None\)"),
    "uneven": (lambda layer, _: setattr(layer.moe_config.moe_parallel_config, "ep_size", 3), "8 experts .* by 3 ranks"),
    "dbo": (lambda layer, _: setattr(layer, "enable_dbo", True), "dual-batch overlap"),
    "lora": (lambda layer, _: setattr(layer.moe_config, "is_lora_enabled", True), "LoRA"),
    "config": (lambda _, config: setattr(config, "additional_config", object()), "no dict but object"),
}


@pytest.mark.parametrize(("change", "reason"), REASONS.values(), ids=REASONS)
def test_what_is_left_to_vllm(config: VllmConfig, change: Callable[[Any, VllmConfig], Any], reason: str) -> None:
    del op_registry_oot["MoERunner"]
    layer = make_layer(config)  # vLLM's own
    assert why_not(layer, config) is None
    change(layer, config)
    found = why_not(layer, config)
    assert found is not None and re.search(reason, found), found


def test_a_layer_that_is_left_to_vllm_runs_there(config: VllmConfig, caplog: pytest.LogCaptureFixture) -> None:
    """And the log says why, once."""
    with caplog.at_level(logging.WARNING, "vllm.moe_ops.integrations.vllm.runner"):
        layers = [make_layer(config, f"layer{index}", swiglu_limit=6.0) for index in range(2)]
    assert [layer.plan for layer in layers] == [None, None]
    lines = [record.message for record in caplog.records if "moe_ops" in record.name]
    assert lines == [
        "moe_ops: a layer is left to vLLM, because limit, alpha and beta of its SwiGLU are (6.0, None, None)."
    ]
    del op_registry_oot["MoERunner"]
    layers.append(make_layer(config, "stock", swiglu_limit=6.0))
    assert not isinstance(layers[2], MoeOpsRunner)
    for layer in layers:
        pack(layer)
    hidden, logits, _ = inputs()
    expected = call(layers[2], config, hidden, logits)
    for layer in layers[:2]:
        torch.testing.assert_close(call(layer, config, hidden, logits), expected)


def test_the_cache_key_tells_the_plugin_and_its_settings(config: VllmConfig) -> None:
    keys = {config.compute_hash()}
    make_layer(config)
    assert set(config.additional_config) == {KEY, f"{KEY}_version", f"{KEY}_forms"}
    keys.add(config.compute_hash())
    users = {KEY: {"packed_payload": False}}
    config.additional_config = users
    make_layer(config, "other")
    assert users == {KEY: {"packed_payload": False}}  # it may serve for another engine
    keys.add(config.compute_hash())
    config.additional_config = _with_key(config.additional_config, read_settings(config.additional_config), "MC2")
    keys.add(config.compute_hash())
    assert len(keys) == 4
