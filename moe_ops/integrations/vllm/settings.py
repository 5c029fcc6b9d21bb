"""What a user of vLLM chooses: by ``additional_config={"moe_ops": {...}}``, or by variables of the environment."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_ops.types import Dispatch, Strategy

KEY = "moe_ops"
"""In vLLM's ``additional_config``."""

AUTO = "auto"
STRATEGIES = {AUTO: None, **{strategy.value: strategy for strategy in Strategy}}
DISPATCHES = {AUTO: None, **{dispatch.value: dispatch for dispatch in Dispatch if dispatch is not Dispatch.LOCAL}}
FLAGS = {"1": True, "0": False, "true": True, "false": False, True: True, False: False}
DEFAULTS = {"strategy": Strategy.ALLGATHER.value, "dispatch": AUTO, "packed_payload": True}


class Settings(NamedTuple):
    """Read once, when a model is loaded.

    Attributes:
        strategy: for layers with expert parallelism; None: chosen by predicted cost.
        dispatch: of ALL2ALL and MC2; None: the strategy's own.
        packed_payload: ALLGATHER: whether hidden states, ids and weights travel in one collective. If not, the hidden states
            travel while the router is at work, and ids and weights after them.
    """

    strategy: Strategy | None
    dispatch: Dispatch | None
    packed_payload: bool

    def to_json(self) -> dict[str, Any]:
        """What ``additional_config`` would hold."""
        return {
            "strategy": AUTO if self.strategy is None else self.strategy.value,
            "dispatch": AUTO if self.dispatch is None else self.dispatch.value,
            "packed_payload": self.packed_payload,
        }


def read_settings(additional_config: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings: of ``additional_config["moe_ops"]``, else of ``MOE_OPS_VLLM_STRATEGY`` and so on, else the defaults.

    Raises:
        ValueError: a setting is not known, has a value that it cannot have, or does not go with the strategy.
    """
    given = additional_config.get(KEY, {})
    if not isinstance(given, Mapping):
        raise ValueError(f"additional_config[{KEY!r}] must be a mapping, got {given!r}")
    unknown = [name for name in given if name not in DEFAULTS]
    if unknown:
        raise ValueError(f"additional_config[{KEY!r}] must have keys of {sorted(DEFAULTS)}, got {unknown}")
    asked = {
        name: given.get(name, environ.get(f"MOE_OPS_VLLM_{name.upper()}") or default)  # empty: not set
        for name, default in DEFAULTS.items()
    }
    settings = Settings(
        _choose("strategy", asked["strategy"], STRATEGIES),
        _choose("dispatch", asked["dispatch"], DISPATCHES),
        _choose("packed_payload", asked["packed_payload"], FLAGS),
    )
    if settings.strategy is Strategy.ALLGATHER and settings.dispatch is not None:
        raise ValueError(
            f"moe_ops setting dispatch must be {AUTO!r} with strategy 'allgather', got {asked['dispatch']!r}"
        )
    if settings.strategy in (Strategy.ALL2ALL, Strategy.MC2) and not settings.packed_payload:
        raise ValueError(f"moe_ops setting packed_payload must be true with strategy {asked['strategy']!r}, got false")
    return settings


def _choose(name: str, value: Any, choices: Mapping[Any, Any]) -> Any:
    if not isinstance(value, str | bool) or value not in choices:
        raise ValueError(f"moe_ops setting {name} must be one of {list(choices)}, got {value!r}")
    return choices[value]
