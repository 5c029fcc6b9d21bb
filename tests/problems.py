"""Layers and batches for the tests of the whole stage: drawn, run on a rank, and what the oracle makes of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import moe_ops as mo
from moe_ops import Dispatch, Strategy
from moe_ops.activations import ACTIVATIONS

from .oracle import dense_moe
from .ranks import groups_of

E = 8
Topology = tuple[int, int, int]
"""[DP, PCP, TP]"""
FORMS = {
    "all2all": (Strategy.ALL2ALL, False, None),
    "all2all-fixed": (Strategy.ALL2ALL, False, Dispatch.FIXED_CAPACITY),
    "all2all-sharded": (Strategy.ALL2ALL, True, Dispatch.ALL_TO_ALL),
    "all2all-sharded-fixed": (Strategy.ALL2ALL, True, Dispatch.FIXED_CAPACITY),
    "mc2": (Strategy.MC2, False, None),
    "mc2-ragged": (Strategy.MC2, False, Dispatch.ALL_TO_ALL),
    "mc2-sharded": (Strategy.MC2, True, Dispatch.FIXED_CAPACITY),
    "allgather-dp": (Strategy.ALLGATHER, False, None),
    "allgather-ep": (Strategy.ALLGATHER, True, Dispatch.LOCAL),
}


WAYS = (
    ("longest",),
    ("per_rank",),
    ("mask",),
    ("longest", "per_rank"),
    ("longest", "mask"),
    ("per_rank", "mask"),
    ("longest", "per_rank", "mask"),
)
"""To say lengths. Without `per_rank` a mask takes all shards of a TP group to have as many rows."""


class Problem(NamedTuple):
    """One layer and one batch on four ranks; each of them makes it from the seed."""

    form: str
    layout: Topology = (2, 1, 2)
    counts: tuple[int, ...] = (3, 5, 2, 4)
    hidden_size: int = 8
    intermediate: int = 8
    routing: mo.Routing = mo.Routing(2, E)
    activation: str = "silu"
    has_bias: bool = False
    shared: str = "none"
    choices: str = "random"
    dtype: torch.dtype = torch.float32
    masked: int = 0
    has_ep: bool = True
    said: tuple[str, ...] = ("longest", "per_rank", "mask")  # fields of Lengths
    chosen: str = "by-logits"  # or by the caller: its ids, or ids and weights
    reduce_results: bool = True
    quant: mo.Quant = mo.Quant.NONE
    weight_quant: mo.Quant = mo.Quant.NONE
    seed: int = 0

    @property
    def sharded(self) -> bool:
        return FORMS[self.form][1]

    def tokens(self, owner: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and logits of one owner: a rank where tokens are sharded, else a TP group."""
        generator = torch.Generator().manual_seed(self.seed * 10 + owner)
        count = self.counts[owner]
        hidden = torch.randn(count, self.hidden_size, generator=generator)
        # Multiples of 1/4: scores are equal, or far enough apart for any rounding.
        logits = torch.randint(-12, 13, (count, E), generator=generator) / 4
        if self.choices == "one":
            logits[:, 5] += 20
        if self.choices == "few":  # none to ranks 0 and 3
            logits[:, 2:6] += 10
        if self.choices == "ties":
            logits = torch.zeros_like(logits)
        return hidden.to(self.dtype), logits

    def choice(self, owner: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights that the caller of one owner chose: some of them no expert's, some twice in a row."""
        generator = torch.Generator().manual_seed(self.seed * 10 + owner + 5)
        shape = self.counts[owner], self.routing.top_k
        weights = torch.rand(shape, generator=generator)
        return torch.randint(-2, E + 1, shape, generator=generator), weights

    def experts(self) -> mo.ExpertWeights:
        generator = torch.Generator().manual_seed(self.seed)
        h, i = self.hidden_size, self.intermediate

        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(self.dtype)

        biases = (draw(E, 2 * i), draw(E, h)) if self.has_bias else (None, None)
        return mo.ExpertWeights(draw(E, 2 * i, h), draw(E, h, i), *biases, activation=self.activation)

    def quantized_experts(self) -> mo.ExpertWeights:
        plain = self.experts()
        if self.weight_quant is mo.Quant.NONE:
            return plain
        w13, w13_scale = mo.quantize_weights(plain.w13, quant=self.weight_quant)
        w2, w2_scale = mo.quantize_weights(plain.w2, quant=self.weight_quant)
        return plain._replace(w13=w13, w2=w2, w13_scale=w13_scale, w2_scale=w2_scale)

    def rounded_experts(self) -> mo.ExpertWeights:
        """The values that the quantised weights stand for."""
        experts = self.quantized_experts()
        if experts.w13_scale is None or experts.w2_scale is None:
            return experts
        w13 = mo.dequantize_weights(experts.w13, experts.w13_scale, num_inputs=self.hidden_size)
        w2 = mo.dequantize_weights(experts.w2, experts.w2_scale, num_inputs=self.intermediate)
        return experts._replace(w13=w13, w2=w2)

    def shared_experts(self) -> mo.SharedExperts | None:
        if self.shared == "none":
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        h, i = self.hidden_size, self.intermediate
        w13, w2, gate = (torch.randn(shape, generator=generator) * 0.3 for shape in ((2 * i, h), (h, i), (1, h)))
        gate = gate.to(self.dtype) if self.seed % 2 else None
        return mo.SharedExperts(w13.to(self.dtype), w2.to(self.dtype), self.shared == "sharded", gate)

    def owner(self, rank: int) -> int:
        return rank if self.sharded else rank // self.layout[2]

    def tp_group(self, rank: int) -> tuple[int, int]:
        """Tokens of the TP group of a rank, and how many of them come before those of this rank."""
        tp = self.layout[2]
        first = rank // tp * tp
        if not self.sharded:
            return self.counts[rank // tp], 0
        return sum(self.counts[first : first + tp]), sum(self.counts[first:rank])

    def num_real(self, rank: int) -> int:
        """Tokens of this rank that the mask keeps: each TP group loses the last `masked`."""
        count, (whole, before) = self.counts[self.owner(rank)], self.tp_group(rank)
        if "mask" not in self.said:
            return count
        return min(max(whole - self.masked - before, 0), count)


@st.composite
def routings(draw: Any) -> mo.Routing:
    top_k = draw(st.sampled_from([1, 2, 3, 4]))
    groups = draw(st.sampled_from([(None, None), (4, 2), (2, 1), (4, 4)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    # Not multiples of anything: sums with them are equal in no two ways that round differently.
    bias = draw(st.sampled_from([None, torch.randn(E, generator=generator) - 0.5]))
    return mo.Routing(
        top_k,
        E,
        scoring=draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
        renormalize=draw(st.booleans()),
        num_expert_group=groups[0],
        topk_group=groups[1],
        e_score_correction_bias=bias,
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        apply_router_weight_on_input=draw(st.integers(0, 3)) == 0,
    )


@st.composite
def problems(draw: Any, form: str) -> Problem:
    problem = Problem(
        form=form,
        layout=draw(st.sampled_from([(2, 1, 2), (1, 2, 2), (2, 2, 1), (4, 1, 1), (1, 1, 4), (1, 4, 1)])),
        counts=tuple(draw(st.lists(st.one_of(st.integers(0, 6), st.sampled_from([17, 31])), min_size=4, max_size=4))),
        hidden_size=draw(st.sampled_from([8, 5, 16])),
        intermediate=draw(st.sampled_from([4, 12])),
        routing=draw(routings()),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        has_bias=draw(st.booleans()),
        shared=draw(st.sampled_from(["none", "sharded", "replicated"])),
        choices=draw(st.sampled_from(["random", "one", "few", "ties"])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        masked=draw(st.sampled_from([0, 1, 3])),
        said=draw(st.sampled_from(WAYS)),
        chosen=draw(st.sampled_from(["by-logits", "by-logits", "ids", "ids-and-weights"])),
        has_ep=draw(st.booleans()) if form == "allgather-dp" else True,
        reduce_results=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    if problem.sharded and "mask" in problem.said and "per_rank" not in problem.said:
        tp = problem.layout[2]
        problem = problem._replace(counts=tuple(problem.counts[rank // tp * tp] for rank in range(4)))
    return problem


def own_experts(problem: Problem, rank: int) -> mo.ExpertWeights:
    """Two of the experts, or without EP a fourth of the intermediate axis of all."""
    whole = problem.quantized_experts()
    if problem.has_ep:
        return whole._replace(**{name: own_part(getattr(whole, name), rank) for name in whole._fields[:6]})
    i = problem.intermediate // 4
    mine = torch.arange(rank * i, rank * i + i)
    if problem.activation == "swigluoai":  # gate and up in turn
        rows = torch.stack((2 * mine, 2 * mine + 1), dim=1).flatten()
    else:
        rows = torch.cat((mine, mine + problem.intermediate))
    bias = None if whole.w13_bias is None else whole.w13_bias[:, rows]
    return whole._replace(w13=whole.w13[:, rows], w2=whole.w2[:, :, mine].clone(), w13_bias=bias)


def own_part(weight: torch.Tensor | None, rank: int) -> torch.Tensor | None:
    return None if weight is None else weight[rank * 2 : rank * 2 + 2].clone()


def own_shared(problem: Problem, groups: mo.ParallelGroups) -> mo.SharedExperts | None:
    shared = problem.shared_experts()
    if shared is None or not shared.is_tp_sharded:
        return shared
    i = problem.intermediate // groups.tp.size
    mine = torch.arange(groups.tp.rank * i, groups.tp.rank * i + i)
    rows = torch.cat((mine, mine + problem.intermediate))
    return shared._replace(w13=shared.w13[rows], w2=shared.w2[:, mine].clone())


class Inputs(NamedTuple):
    """What changes from call to call; lengths travel as the rows of tensors."""

    hidden: torch.Tensor
    logits: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    mask: torch.Tensor
    longest: torch.Tensor
    counts: list[torch.Tensor]


def make_inputs(rank: int, problem: Problem) -> Inputs:
    hidden, logits = problem.tokens(problem.owner(rank))
    ids, weights = problem.choice(problem.owner(rank))
    num_real, tp = problem.num_real(rank), problem.layout[2]
    if problem.shared == "none":
        hidden[num_real:] = torch.nan
    logits[num_real:] = torch.nan
    weights[num_real:] = torch.nan
    counts = [problem.counts[problem.owner(other)] for other in range(4)]
    longest, (whole, _) = max(counts), problem.tp_group(rank)
    rows = longest * tp if problem.sharded else -(-longest // tp) * tp  # common to all ranks
    mask = torch.arange(rows) < whole - problem.masked
    mo.mark_token_axes(hidden, logits, ids, weights, mask)
    return Inputs(hidden, logits, ids, weights, mask, mo.token_count(longest), [mo.token_count(c) for c in counts])


def lengths_of(problem: Problem, inputs: Inputs) -> mo.Lengths:
    """What the problem says of them."""
    return mo.Lengths(
        longest=inputs.longest.shape[0] if "longest" in problem.said else None,
        equal="equal" in problem.said,
        per_rank=[count.shape[0] for count in inputs.counts] if "per_rank" in problem.said else None,
        mask=inputs.mask if "mask" in problem.said else None,
    )


def groups_for(problem: Problem) -> mo.ParallelGroups:
    groups = groups_of(*problem.layout)
    return groups if problem.has_ep else groups._replace(ep=mo.Group.single())


def layout_for(problem: Problem) -> mo.Layout:
    strategy, sharded, dispatch = FORMS[problem.form]
    return mo.Layout(strategy, groups_for(problem), dispatch, tokens_are_sharded=sharded)


def make_stage(
    rank: int,
    problem: Problem,
    experts: mo.ExpertWeights | None = None,
    shared: mo.SharedExperts | None = None,
    run: Callable[..., Any] = mo.moe_stage,
    **keywords: Any,
) -> Callable[[Inputs], Any]:
    """The stage of a rank, with its weights of the problem unless others are given; `run` may be `moe_stage_steps`."""
    layout = layout_for(problem)
    groups = layout.groups
    experts = own_experts(problem, rank) if experts is None else experts
    shared = own_shared(problem, groups) if shared is None else shared
    is_partial = mo.output_reduction(layout) is mo.Reduction.PARTIAL_OVER_TP

    def stage(inputs: Inputs) -> Any:
        result = run(
            inputs.hidden,
            None if problem.chosen == "ids-and-weights" else inputs.logits,
            experts,
            problem.routing,
            layout,
            lengths=lengths_of(problem, inputs),
            quant=problem.quant,
            topk_ids=None if problem.chosen == "by-logits" else inputs.topk_ids,
            topk_weights=inputs.topk_weights if problem.chosen == "ids-and-weights" else None,
            shared_experts=shared,
            reduce_results=problem.reduce_results,
            **keywords,
        )
        if is_partial and not problem.reduce_results and run is mo.moe_stage:  # then the sum is the caller's
            result = torch.ops.moe_ops.all_reduce(result, groups.tp.name, groups.tp.size)
        return result

    return stage


def run_stage(rank: int, problem: Problem) -> torch.Tensor:
    return make_stage(rank, problem)(make_inputs(rank, problem))


def compiles(rank: int, problem: Problem) -> bool:
    """One rank of the four, which the seed says; the others are eager. To compile takes seconds, and ranks compile alike."""
    return rank == problem.seed % 4


def run_compiled(rank: int, problem: Problem, all_counts: list[tuple[int, ...]], backend: str) -> Any:
    """The results of all counts, and how many graphs there are."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    stage = make_stage(rank, problem)
    if compiles(rank, problem):
        stage = torch.compile(stage, backend=counter, fullgraph=True)
    with torch.no_grad():
        return [stage(make_inputs(rank, problem._replace(counts=counts))) for counts in all_counts], counter.frame_count


def expected_of(problem: Problem, rank: int) -> torch.Tensor:
    """What the layer is, of the tokens that are not masked; of the others, what the shared experts make of them."""
    hidden, logits = problem.tokens(problem.owner(rank))
    ids, weights = problem.choice(problem.owner(rank))
    num_real, shared = problem.num_real(rank), problem.shared_experts()
    expected = dense_moe(
        hidden[:num_real],
        logits[:num_real],
        problem.rounded_experts(),
        problem.routing,
        topk_ids=None if problem.chosen == "by-logits" else ids[:num_real],
        topk_weights=weights[:num_real] if problem.chosen == "ids-and-weights" else None,
        shared=shared,
    )
    nothing = problem.routing._replace(routed_scaling_factor=0.0)
    rest = dense_moe(hidden[num_real:], logits[num_real:], problem.experts(), nothing, shared=shared)
    return torch.cat([expected, rest if shared is not None else torch.zeros_like(rest)])
