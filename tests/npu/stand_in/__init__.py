"""A stand-in for Huawei CANN, so that torch_npu, torchair and npugraph_ex import and run on a machine that has no NPU.

The wheels are the real ones; what is replaced is the libraries below them. It can show

- what graph a front end makes of a function: torchair's GE graph with its operators and attributes, npugraph_ex's FX graph;
- that a call is accepted by the host side of torch_npu and gives results of the right shapes and dtypes;
- which kernels and collectives are launched, and which group's communicator an op was given;
- that nothing waits for the device while a graph is captured, and that side streams join before the capture ends;
- that a captured graph is replayed.

It cannot show any result: no kernel computes anything and no collective sends anything, so the values of a tensor on this
device are those that were copied there, or chance. Nor can it show that GE compiles a graph, nor time or overlap, nor the
errors of real hardware.

The variable `CANN_STAND_IN_SOC` chooses the chip among `CHIPS`. torch_npu asks for the chip once, so a process has one.
`load()` comes before `import torch_npu`, and the variable TORCH_DEVICE_BACKEND_AUTOLOAD=0 before `import torch`, which would
import torch_npu itself.
"""

from .load import CHIPS, StandIn, chip_name, load

__all__ = ["CHIPS", "StandIn", "chip_name", "load"]
