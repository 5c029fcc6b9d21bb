"""What tests read of torchair's GE graphs."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

# Operators that hold or begin values that are known without the device's memory, and the end of the graph.
PLUMBING = frozenset({"Data", "Const", "Constant", "Shape", "NetOutput"})
# Operators that make a tensor of sizes alone.
CREATING = frozenset({"Empty", "Fill", "Range"})
SYMBOL_TYPE = "SymInt"


@dataclass(frozen=True)
class Node:
    """An operator of a GE graph."""

    name: str
    type: str
    inputs: tuple[str | None, ...]  # the type of the operator behind each input, None for one that is not given
    sources: tuple[str | None, ...]  # and its name
    num_outputs: int
    attributes: dict[str, Any]
    is_symbol: bool  # a Data that is a size of the traced function

    @property
    def num_inputs(self) -> int:
        """How many inputs it has, those included that are not given."""
        return len(self.inputs)


class GeGraph:
    """A GE graph that torchair made, in the order of its operators."""

    def __init__(self, definition: Any):
        self.definition = definition
        types = {op.name: op.type for op in definition.op}
        self.all_nodes = [_node(op, types) for op in definition.op]

    @property
    def types(self) -> list[str]:
        """The type of each operator, Data, Const and NetOutput among them."""
        return [node.type for node in self.all_nodes]

    @cached_property
    def compute_types(self) -> list[str]:
        """The type of each operator that computes a tensor: without inputs, constants and the arithmetic of sizes."""
        types: list[str] = []
        sizes: set[str] = set()  # names of operators whose result is a size
        for node in self.all_nodes:
            if node.type in PLUMBING:
                if node.type != "Data" or node.is_symbol:
                    sizes.add(node.name)
            elif node.type not in CREATING and all(source in sizes for source in node.sources if source is not None):
                sizes.add(node.name)
            else:
                types.append(node.type)
        return types

    def nodes(self, type: str) -> list[Node]:
        """The operators of a type."""
        return [node for node in self.all_nodes if node.type == type]

    def node(self, type: str) -> Node:
        """The only operator of a type."""
        (found,) = self.nodes(type)
        return found


def _node(op: Any, types: dict[str, str]) -> Node:
    edges = [edge for edge in op.input if not edge.endswith(":-1")]  # -1 is an edge that only orders
    sources = [edge.rpartition(":")[0] or None for edge in edges]
    return Node(
        name=op.name,
        type=op.type,
        inputs=tuple(types.get(source) if source else None for source in sources),
        sources=tuple(sources),
        num_outputs=len(op.output_desc),
        attributes={name: attribute_value(value) for name, value in op.attr.items() if not name.startswith("_")},
        is_symbol=op.type == "Data" and any(SYMBOL_TYPE in desc.attr["_meta"].s.decode() for desc in op.output_desc),
    )


def attribute_value(attribute: Any) -> Any:
    """An attribute as a value of python: dtypes by GE's number, tensors as GE has them."""
    kind = attribute.WhichOneof("value")
    value = getattr(attribute, kind) if kind else None
    if kind == "s":
        return value.decode()
    if kind == "list":
        return _list(value)
    if kind == "list_list_int":
        return [list(inner.list_i) for inner in value.list_list_i]
    return value


def _list(value: Any) -> list[Any]:
    for field, items in value.ListFields():
        if field.name != "val_type":
            return [item.decode() if isinstance(item, bytes) else item for item in items]
    return []
