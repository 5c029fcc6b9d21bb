"""Loads the stand-in, and asks it what it saw."""

import ctypes
import importlib
import os
from collections.abc import Callable
from pathlib import Path

from .build import MAIN_LIBRARY, SHELLS, build_libraries

CHIPS = ("Ascend910_9391", "Ascend950PR_9589")  # of Atlas A3, and A5
CHIP_VARIABLE = "CANN_STAND_IN_SOC"
CACHE_VARIABLE = "CANN_STAND_IN_CACHE"
DEFAULT_CACHE = Path(__file__).parents[3] / "build" / "cann_stand_in"


class StandIn:
    """The loaded stand-in: counts since the process began."""

    def __init__(self, library: ctypes.CDLL, chip: str):
        self._library = library
        self.chip = chip
        library.stand_in_launch.restype = ctypes.c_char_p
        library.stand_in_launch.argtypes = [ctypes.c_size_t]
        library.stand_in_num_launches.restype = ctypes.c_size_t

    @property
    def captures(self) -> int:
        """Captures that ended well."""
        return self._library.stand_in_captures()

    @property
    def replays(self) -> int:
        """Replays of captured graphs."""
        return self._library.stand_in_replays()

    @property
    def refusals(self) -> int:
        """Waits for the device that were refused because it captured."""
        return self._library.stand_in_refusals()

    def launches_during(self, call: Callable[[], object]) -> list[str]:
        """The kernels (`aclnn...`) and collectives (`Hccl...`) that `call` launched, in order."""
        import torch

        torch.npu.synchronize()  # kernels are launched from a thread of torch_npu's
        first = self._library.stand_in_num_launches()
        call()
        torch.npu.synchronize()
        return [self._library.stand_in_launch(i).decode() for i in range(first, self._library.stand_in_num_launches())]


def chip_name() -> str:
    """The chip that the environment asks for."""
    chip = os.environ.get(CHIP_VARIABLE, CHIPS[0])
    if chip not in CHIPS:
        raise ValueError(f"{CHIP_VARIABLE} must be one of {', '.join(CHIPS)}, got {chip!r}")
    return chip


def load() -> StandIn:
    """Build the stand-in where that was not done, load it, and import torch_npu over it."""
    chip = chip_name()
    folder = build_libraries(Path(os.environ.get(CACHE_VARIABLE, DEFAULT_CACHE)))
    # Once a library of a name is loaded, the loader takes it for all that need one of that name: no search path is set.
    main = ctypes.CDLL(str(folder / MAIN_LIBRARY), mode=ctypes.RTLD_GLOBAL)
    for shell in SHELLS:
        ctypes.CDLL(str(folder / shell), mode=ctypes.RTLD_GLOBAL)
    importlib.import_module("torch_npu")  # which also makes torchair and npugraph_ex known as modules
    return StandIn(main, chip)
