"""All knowledge of shapes: the integer arithmetic of the strategies and the shape function of every ``moe_ops`` op.

The shape function of an op that computes is its registered fake. The fake of an op that communicates follows from its body;
its shape function here is the contract that tests hold the body to, and the fake for a back end that swaps in one opaque
kernel. Nothing here knows a kernel, and nothing but torch is imported.
"""
