"""What `moe-ops plan` shows: the layer, how long collectives take; for each token count a table, the choice and the load."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_ops.cost_types import FormCost
from moe_ops.plan.plans import Plan, Request
from moe_ops.types import Quant, Strategy

PLAIN_WIDTH = 100


def make_console() -> Console:
    """Standard output; wide enough for the table where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def form_name(cost: FormCost, *, tokens_are_sharded: bool) -> str:
    """What the report calls a form: the fields of `Layout` that make it, and which form of ALLGATHER."""
    if cost.strategy is Strategy.ALLGATHER:
        return f"ALLGATHER, {'EP' if tokens_are_sharded else 'DP'} form"
    return f"{cost.strategy.name} {cost.dispatch.name}"


def group_costs(costs: Sequence[FormCost]) -> list[list[FormCost]]:
    """Forms that send the same by the same dispatch, together; the order stays."""
    groups: dict[tuple[object, ...], list[FormCost]] = {}
    for cost in costs:
        groups.setdefault((cost.dispatch, cost.collectives), []).append(cost)
    return list(groups.values())


def group_name(costs: Sequence[FormCost], *, tokens_are_sharded: bool) -> str:
    """The name of the first form, and the other strategies."""
    name = form_name(costs[0], tokens_are_sharded=tokens_are_sharded)
    return f"{name} (or {', '.join(cost.strategy.name for cost in costs[1:])})" if len(costs) > 1 else name


def show(console: Console, request: Request, plans: list[Plan]) -> None:
    """Print all of it."""
    for line in describe(request):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for plan in plans:
        console.print(make_table(request, plan))
        for line in conclude(request, plan):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def describe(request: Request) -> list[str]:
    """The layer, the topology and the calibration."""
    model, topology = request.model, request.topology
    dtype = str(request.layer.dtype).removeprefix("torch.")
    local = model.num_experts // topology.ep
    weights = model.matrices * local * model.hidden_size * model.intermediate_size
    quant = "" if request.layer.quant is Quant.NONE else f", quantised to {request.layer.quant.value}"
    lines = [
        f"{model.name}: hidden {model.hidden_size}, intermediate {model.intermediate_size}, "
        f"{model.num_experts} experts, top-{model.top_k}; {dtype} activations{quant}",
        f"TP {topology.tp} x DP {topology.dp} x PCP {topology.pcp} = EP {topology.ep}: {local} experts a rank, "
        f"{weights / 1e6:,.0f} million weights; tokens "
        f"{'sharded over TP' if request.tokens_are_sharded else 'whole on each TP rank'}",
    ]
    links = set(request.calibration)
    if len(links) == 1:
        link = links.pop()
        lines.append(f"Each collective: {1e6 * link.latency:g} us + bytes / {8e-9 * link.bandwidth:g} Gb/s")
    else:
        lines.append(
            "; ".join(
                f"{kind}: {1e6 * link.latency:.0f} us + bytes / {8e-9 * link.bandwidth:.2g} Gb/s"
                for kind, link in request.calibration._asdict().items()
            )
        )
    lines[-1] += f" ({request.calibration_source})"
    return lines


def make_table(request: Request, plan: Plan) -> Table:
    """Each form, cheapest first, and its collectives."""
    title = f"\nTokens of a TP group: {plan.num_tokens:,}; routing: {escape(request.routing)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.collapse_padding, table.pad_edge = True, False
    table.add_column("")
    table.add_column("form, its collectives")
    table.add_column("over")
    for name in ("rows", "bytes sent\nper rank", "bytes\nreceived", "predicted\nus"):
        table.add_column(name, justify="right")
    for costs in sorted(group_costs(plan.selection.costs), key=lambda costs: costs[0].seconds):
        cost, is_chosen = costs[0], costs[0][:2] == plan.selection[:2]  # the first of equal ones is chosen
        name = group_name(costs, tokens_are_sharded=request.tokens_are_sharded)
        totals = f"{cost.bytes_sent:,.0f}", "", f"{1e6 * cost.seconds:,.1f}"
        table.add_row("->" if is_chosen else "", name, "", "", *totals, style="bold green" if is_chosen else "bold")
        for one in cost.collectives:
            cells = [f"{number:,.0f}" for number in (one.rows, one.bytes_sent, one.bytes_received)]
            table.add_row("", f"  {one.step}: {one.kind.value}", one.axis, *cells, f"{1e6 * one.seconds:,.1f}")
        table.add_section()
    return table


def conclude(request: Request, plan: Plan) -> list[str]:
    """The choice, the rule's choice, and the load."""
    selection, load, model = plan.selection, plan.load, request.model
    chosen = next(one for one in selection.costs if (one.strategy, one.dispatch) == selection[:2])
    name = form_name(chosen, tokens_are_sharded=request.tokens_are_sharded)
    lines = [f"Choice: {name}: {selection.reason}"]
    if plan.rule is not None and request.device is not None:
        rule = plan.rule
        lines.append(
            f"vllm-ascend's rule for {request.device.value}: {rule.strategy.name} {rule.dispatch.name}: {rule.reason}"
        )
    busiest = max(load.ranks)
    # A multiply-add is two.
    flops = 2 * model.matrices * busiest * model.hidden_size * model.intermediate_size
    lines.append(
        f"Load: busiest expert {load.expert_imbalance:.2f} times the mean ({max(load.experts):,} rows), busiest rank "
        f"{load.rank_imbalance:.2f} times ({busiest:,} rows, {flops / 1e9:,.1f} GFLOP)"
    )
    return lines
