"""MoE layers of models: a few by name, others from their ``config.json``."""

import json
from pathlib import Path
from typing import Any, NamedTuple


class Model(NamedTuple):
    """Sizes of a MoE layer: H, I of one expert, E, K."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


# From the config.json that each is published with.
PRESETS = {
    "qwen3-235b-a22b": Model("Qwen3-235B-A22B", 4096, 1536, 128, 8),
    "deepseek-v3": Model("DeepSeek-V3", 7168, 2048, 256, 8),
    "mixtral-8x7b": Model("Mixtral-8x7B", 4096, 14336, 8, 2),
    "gpt-oss-120b": Model("gpt-oss-120b", 2880, 2880, 128, 4),
}

# Model families name these differently; the first key that there is counts.
KEYS = {
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("moe_intermediate_size", "intermediate_size"),
    "num_experts": ("num_experts", "n_routed_experts", "num_local_experts"),
    "top_k": ("num_experts_per_tok",),
}


def read_config(path: Path) -> Model:
    """The MoE layer of a Hugging Face ``config.json``; of a model with several parts, that of ``text_config``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON object, or a size is missing or no positive integer.
    """
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--config {path} must be JSON, got {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {path} must be a JSON object, got {type(config).__name__}")
    text = config.get("text_config")
    sizes = {name: _size(path, text if isinstance(text, dict) else config, keys) for name, keys in KEYS.items()}
    return Model(str(config.get("model_type", path)), **sizes)


def _size(path: Path, config: dict[str, Any], keys: tuple[str, ...]) -> int:
    for key in keys:
        size = config.get(key)
        if size is None:
            continue
        if type(size) is not int or size < 1:  # True is an int, too
            raise ValueError(f"--config {path}: {key} must be a positive integer, got {size!r}")
        return size
    raise ValueError(f"--config {path} must have {' or '.join(keys)}, which is missing")
