"""All knowledge of shapes, the ground floor of the library: it imports nothing but torch, and it knows no kernel.

Three things are here: the integer arithmetic of the strategies (`layout`), the checks of arguments, and a shape function for
every op of ``moe_ops``.

The shape function of an op that computes is its registered fake. The fake of an op that communicates follows from its body;
its shape function is the contract that tests hold the body to, and the fake for a back end that puts one opaque kernel in its
place.

``check_<op>`` takes the arguments of the op. ``moe_ops._library.define`` runs it before every kernel and before the fake, so a
shape function checks nothing.
"""
