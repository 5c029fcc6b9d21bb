"""The picture of a plan: predicted time and bytes sent of each form, over the tokens."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_ops.plan.plans import Plan, Request
from moe_ops.plan.report import group_costs, group_name


def check_path(path: Path) -> None:
    """Raise ValueError unless a picture can be written to `path`: its ending says the format."""
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"--plot must end in one of {', '.join('.' + name for name in formats)}, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot must be in a directory that exists, got {path}")


def draw(path: Path, request: Request, plans: list[Plan]) -> None:
    """Write it to `path`.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    time, sent = figure.subplots(1, 2)
    tokens = [plan.num_tokens for plan in plans]
    for costs in group_costs(plans[0].selection.costs):
        index = plans[0].selection.costs.index(costs[0])
        drawn = [plan.selection.costs[index] for plan in plans]
        label = group_name(costs, tokens_are_sharded=request.tokens_are_sharded)
        time.plot(tokens, [1e6 * cost.seconds for cost in drawn], marker="o", label=label)
        sent.plot(tokens, [cost.bytes_sent for cost in drawn], marker="o")
    _label(time, "predicted microseconds")
    _label(sent, "bytes sent per rank")
    topology = request.topology
    figure.suptitle(
        f"{request.model.name}, TP {topology.tp} x DP {topology.dp} x PCP {topology.pcp}, routing {request.routing}"
    )
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)


def _label(axes: Axes, name: str) -> None:
    axes.set_xscale("symlog", base=2, linthresh=1)  # a logarithm that has room for zero
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel("tokens of a TP group")
    axes.set_ylabel(name)
    axes.grid(visible=True, alpha=0.3)
