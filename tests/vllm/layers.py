"""MoE layers as vLLM's models make them, on one rank, with random weights."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

import moe_ops as mo

E, H, I, TOP_K, VOCABULARY = 8, 64, 32, 2, 11


def make_layer(config: VllmConfig, prefix: str = "layer", seed: int = 0, **arguments: Any) -> Any:
    """A layer with random weights, which are not packed yet."""
    routed = {"num_experts": E, "top_k": TOP_K, "hidden_size": H, "intermediate_size": I}
    layer = FusedMoEFactory(**{**routed, "prefix": prefix, "params_dtype": torch.float32, **arguments})
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.routed_experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return layer


def pack(layer: Any) -> None:
    layer.routed_experts.quant_method.process_weights_after_loading(layer.routed_experts)


def plain_weights(layer: Any) -> mo.ExpertWeights:
    """A copy of them, before they are packed."""
    named = dict(layer.routed_experts.named_parameters())
    weights = [
        named[name].clone() if name in named else None for name in ("w13_weight", "w2_weight", "w13_bias", "w2_bias")
    ]
    return mo.ExpertWeights(*weights, activation=layer.activation.value)


def inputs(count: int = 7, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, logits and token ids, of which some are padding."""
    generator = torch.Generator().manual_seed(seed)
    hidden, logits = (torch.randn(count, width, generator=generator) for width in (H, E))
    ids = torch.randint(VOCABULARY, (count,), generator=generator)
    ids[2::3] = -1
    return hidden, logits, ids


def call(layer: Any, config: VllmConfig, *tensors: torch.Tensor) -> torch.Tensor:
    """As an engine does, that is: with tensors of which the rows may change, should the layer be compiled."""
    copies = [tensor.clone() for tensor in tensors]
    for tensor in copies:
        torch._dynamo.mark_dynamic(tensor, 0)
    with set_forward_context(None, config, num_tokens=tensors[0].shape[0]):
        output: torch.Tensor = layer(*copies)
        return output
