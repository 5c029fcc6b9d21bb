"""MoE layers of models: a few by name, others from their ``config.json``."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple


class Model(NamedTuple):
    """Sizes of a MoE layer: H of what the experts take, I of one expert, E, K, and how many matrices an expert has."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    matrices: int = 3


# From the config.json that each is published with.
PRESETS = {
    "qwen3-235b-a22b": Model("Qwen3-235B-A22B", 4096, 1536, 128, 8),
    "deepseek-v3": Model("DeepSeek-V3", 7168, 2048, 256, 8),
    "mixtral-8x7b": Model("Mixtral-8x7B", 4096, 14336, 8, 2),
    "gpt-oss-120b": Model("gpt-oss-120b", 2880, 2880, 128, 4),
}

WIDTHS = {
    # Some models project tokens down before they send them to experts.
    "hidden_size": ("moe_latent_size", "moe_hidden_size", "hidden_size"),
    "intermediate_size": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
}
"""Model families name these differently. A file may have several, which mean different things: the first counts."""

COUNTS = {
    "num_experts": ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"),
}
"""Likewise; but of these all mean the same."""

# A key with a word about experts, one about counts or widths, and none about others says something of the sizes or the number
# of routed experts.
ABOUT_EXPERTS = {"expert", "experts", "moe", "routed"}
ABOUT_COUNTS = {"num", "n", "count", "per", "top", "topk"}
ABOUT_WIDTHS = {"size", "sizes", "dim", "dims", "width", "hidden", "intermediate", "inner", "latent", "ffn"}
ABOUT_OTHERS = {"shared", "share", "group", "groups", "layer", "layers"}
READ = {key for keys in (WIDTHS | COUNTS).values() for key in keys}
NO_EXPERTS = {"is_moe"}
"""Keys of models (Doge) whose `num_experts` are no MLPs."""


def read_config(path: Path) -> Model:
    """The MoE layer of a Hugging Face ``config.json``; of a model with several parts, that of ``text_config``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object; a size is missing, no positive integer, not the same for all layers, or said twice
            and differently; or a key seems to change the sizes or the number of the experts in a way that is not known.

    Example::

        model = read_config(Path("config.json"))
    """
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--config {path} must be JSON, got {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {path} must be a JSON object, got {type(config).__name__}")
    name, text = str(config.get("model_type", path)), config.get("text_config")
    config = text if isinstance(text, dict) else config
    sizes = _read_sizes(path, config)
    layers = config.get("per_layer_config") or []
    layers = list(layers.values()) if isinstance(layers, dict) else layers
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError(f"--config {path}: per_layer_config must be objects, one for each layer, got {layers!r}")
    for layer in layers:
        if _read_sizes(path, config | layer) != sizes:
            raise ValueError(
                f"--config {path}: per_layer_config must leave the sizes of experts as they are, got {layer}"
            )
    has_gate = config.get("mlp_hidden_act") != "relu2"  # Nemotron-H has experts of two matrices
    return Model(name, **sizes, matrices=3 if has_gate else 2)


def _read_sizes(path: Path, config: dict[str, Any]) -> dict[str, int]:
    for key, value in config.items():
        if key in NO_EXPERTS or (value and key not in READ and _is_about_experts(key)):
            raise ValueError(
                f"--config {path}: {key} must not be there, for it is not known what it means, got {value!r}"
            )
    found = {name: _find(path, config, keys) for name, keys in (WIDTHS | COUNTS).items()}
    for name in COUNTS:
        (first, value), *others = found[name].items()
        for key, other in others:
            if other != value:
                raise ValueError(f"--config {path}: {key} must be {value}, as {first} is, got {other}")
    return {name: next(iter(values.values())) for name, values in found.items()}


def _is_about_experts(key: str) -> bool:
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", key)}  # of snake_case, and of camelCase
    return bool(words & ABOUT_EXPERTS and words & (ABOUT_COUNTS | ABOUT_WIDTHS)) and not words & ABOUT_OTHERS


def _find(path: Path, config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, int]:
    """The sizes that are there, by key; one at least."""
    found = {}
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        sizes = value if isinstance(value, list) and value else [value]  # a list: one for each layer
        for size in sizes:
            if type(size) is not int or size < 1:  # True is an int, too
                raise ValueError(f"--config {path}: {key} must be a positive integer, got {value!r}")
            if size != sizes[0]:
                raise ValueError(f"--config {path}: {key} must be the same for all layers, got {value!r}")
        found[key] = sizes[0]
    if not found:
        raise ValueError(f"--config {path} must have {' or '.join(keys)}, which is missing")
    return found
