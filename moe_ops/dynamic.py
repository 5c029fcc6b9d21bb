"""One graph for every token count: how token axes and token counts are shown to a compiler."""

import torch


def mark_token_axes(*tensors: torch.Tensor) -> None:
    """Mark dim 0 of each tensor as a size that compiled code knows nothing about, 0 and 1 included.

    Call it on the inputs of a compiled function, before the call. A dimension that is merely dynamic still compiles anew for
    0 and for 1; this one never does. The sizes of two tensors may differ, unless an op demands that they are equal.

    Source: ``torch._dynamo.decorators.mark_unbacked``.

    Example::

        mo.mark_token_axes(hidden_states, router_logits)
        y = compiled_layer(hidden_states, router_logits)
    """
    from torch._dynamo.decorators import mark_unbacked  # two seconds that eager code does without

    for tensor in tensors:
        mark_unbacked(tensor, 0)


def token_count(num_tokens: int) -> torch.Tensor:
    """A tensor ``[num_tokens, 0]`` that carries a token count, in its shape, into a compiled function.

    ``torch.compile`` makes a constant of an integer argument that is 0 or 1; the size of a marked axis stays a variable. It
    holds no bytes.

    Example::

        y = compiled_layer(x, mo.token_count(5))  # inside the layer: mo.Lengths(longest=count.shape[0])
    """
    if num_tokens < 0:
        raise ValueError(f"token_count: num_tokens must not be negative, got {num_tokens}")
    count = torch.empty(num_tokens, 0)
    mark_token_axes(count)
    return count
