"""Tests over the real torch_npu, torchair and npugraph_ex; see `stand_in` for what is below them, and what that can show."""

from .stand_in import load

STAND_IN = load()  # here, before any module of this package imports torch_npu, torchair or npugraph_ex
