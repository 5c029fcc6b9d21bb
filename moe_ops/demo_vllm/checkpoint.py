"""Models of a given size with random weights, as checkpoints that vLLM loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging


def write_checkpoint(path: Path, model_type: str, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
    """Write a model whose weights are the same in each run, and such that the probabilities of tokens differ clearly.

    Args:
        path: a directory.
        model_type: as Transformers names it, such as ``qwen3_moe``.
        dtype: of the weights.
        settings: of the model's config.
    """
    config: PreTrainedConfig = CONFIG_MAPPING[model_type](**settings)
    torch.manual_seed(0)
    make_model: Callable[..., Any] = AutoModelForCausalLM.from_config  # which is not annotated
    model = make_model(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(path)
