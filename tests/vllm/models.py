"""Tiny models with random weights, written as checkpoints by Transformers and served by vLLM."""

from pathlib import Path
from typing import Any

from moe_ops.demo_vllm.checkpoint import write_checkpoint

VOCABULARY = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LATENT_ATTENTION: dict[str, Any] = {  # of DeepSeek; vLLM's kernel takes these sizes alone
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
QWEN: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3_moe", {**QWEN, "head_dim": 32, "norm_topk_prob": True}),
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 128}),
    "deepseek2": (
        "deepseek_v2",
        {**LATENT_ATTENTION, "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    ),
    "deepseek3": (
        "deepseek_v3",
        {**LATENT_ATTENTION, "norm_topk_prob": True, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 32}),
}
"""Each with the name of its config, and what that has beside or instead of what all have."""


def write_model(name: str, directory: Path) -> Path:
    """Write a checkpoint, once."""
    path = directory / name
    if not path.exists():
        model_type, own = MODELS[name]
        write_checkpoint(path, model_type, **{**COMMON, **own})
    return path
