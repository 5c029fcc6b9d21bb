"""Functions of single elements, whose results do not depend on the element's position.

torch's vector loops on a CPU leave the last few elements to scalar code that rounds in another way, so a row's values would
depend on how many rows there are, and a token's experts on its batch. Here every row is padded to full vectors first.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

VECTOR = 32
"""Elements; a multiple of what one step of a vector loop takes."""


def each(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``[rows, width] -> [rows, width]``: the function of each element."""
    missing = -x.shape[1] % VECTOR if x.device.type == "cpu" else 0
    padded = F.pad(x, (0, missing)) if missing else x.contiguous()
    return function(padded)[:, : x.shape[1]]
