"""vllm-ascend's own layers on ranks: its real source, over vLLM's groups on gloo (`ascend_stand_in` says what is not real)."""

import os
import sys
import types
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch

from .ascend_stand_in import prepare_process

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 16, 8, 8, 2


class Layout(NamedTuple):
    """How ranks are laid out, and which layer they have."""

    dp: int
    tp: int
    ep: bool = True
    is_sequence_parallel: bool = False


def vllm_config_of(layout: Layout, rank: int) -> Any:
    """That of an engine which is started on all ranks at once, as by torchrun."""
    from vllm.config import DeviceConfig, ParallelConfig, VllmConfig

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(layout.dp * layout.tp))
    parallel = ParallelConfig(
        tensor_parallel_size=layout.tp,
        data_parallel_size=layout.dp,
        enable_expert_parallel=layout.ep,
        distributed_executor_backend="external_launcher",
    )
    return VllmConfig(parallel_config=parallel, device_config=DeviceConfig("cpu"))


def start_groups(rank: int, layout: Layout, config: Any) -> None:
    """vLLM's groups and vllm-ascend's, of this layout instead of the last."""
    from vllm.distributed import parallel_state as state
    from vllm_ascend.ascend_config import init_ascend_config
    from vllm_ascend.distributed import parallel_state as ascend_state

    world = layout.dp * layout.tp
    if state.model_parallel_is_initialized():
        state.destroy_model_parallel()
        ascend_state.destroy_ascend_model_parallel()
    init_ascend_config(config)
    state.init_distributed_environment(world, rank, "env://", rank, "gloo")
    state.initialize_model_parallel(layout.tp, backend="gloo")
    ascend_state.init_ascend_model_parallel(config.parallel_config)


def runner_of(rank: int, layout: Layout, w13: torch.Tensor, w2: torch.Tensor) -> tuple[Any, Any]:
    """The layer that vLLM's factory makes, with this rank's part of the weights; and the engine's config."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    from moe_ops.integrations.vllm_ascend.install import register

    register()
    config = vllm_config_of(layout, rank)
    with set_current_vllm_config(config):
        start_groups(rank, layout, config)
        runner = FusedMoEFactory(
            num_experts=EXPERTS,
            top_k=TOP_K,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            params_dtype=torch.float32,
            renormalize=True,
            prefix=f"{layout}",
            is_sequence_parallel=layout.is_sequence_parallel,
            pcp_size=1,
        )
        experts = runner.routed_experts
        _load(experts, w13, w2)
        experts.quant_method.process_weights_after_loading(experts)
    return runner, config


def _load(experts: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
    config = experts.moe_config
    if config.ep_size > 1:
        own = slice(config.ep_rank * config.num_local_experts, (config.ep_rank + 1) * config.num_local_experts)
        experts.w13_weight.data.copy_(w13[own])
        experts.w2_weight.data.copy_(w2[own])
        return
    size = INTERMEDIATE // config.tp_size
    own = slice(config.tp_rank * size, (config.tp_rank + 1) * size)
    experts.w13_weight.data.copy_(torch.cat([half[:, own] for half in w13.chunk(2, dim=1)], dim=1))
    experts.w2_weight.data.copy_(w2[:, :, own])


def run_layer(
    rank: int, layout: Layout, method: str, weights: Sequence[torch.Tensor], tokens: Sequence[Sequence[torch.Tensor]]
) -> tuple[str, str, str | None, torch.Tensor]:
    """One step of a layer: the classes of its runner and experts, why it is left to vllm-ascend, and this rank's result."""
    prepare_process()
    runner, config = runner_of(rank, layout, *weights)
    x, logits = tokens_of(rank, layout, tokens)
    with step(config, method, rank, layout, tokens):
        result = runner(x, logits)
    experts = runner.routed_experts
    return type(runner).__name__, type(experts).__name__, experts.reason_against, result


def run_both_methods(
    rank: int, layout: Layout, method: str, weights: Sequence[torch.Tensor], tokens: Sequence[Sequence[torch.Tensor]]
) -> list[Sequence[torch.Tensor | None]]:
    """Rows, logits and mask that prepare makes, and what finalize makes of the rows: vllm-ascend's, then this library's."""
    import moe_ops as mo

    prepare_process()
    runner, config = runner_of(rank, layout, *weights)
    from vllm_ascend.ascend_forward_context import MoECommType
    from vllm_ascend.ops.fused_moe.moe_comm_method import get_moe_comm_method

    from moe_ops.integrations.vllm_ascend.step import read_step

    x, logits = tokens_of(rank, layout, tokens)
    is_shard = layout.is_sequence_parallel
    with step(config, method, rank, layout, tokens), runner._sequence_parallel_context():
        theirs = get_moe_comm_method(MoECommType[method], runner.moe_config)
        out = theirs.prepare(x, logits, replace_allreduce=is_shard)
        end = theirs.finalize(out.hidden_states.clone(), False, out.padded_hidden_states_shape)
        strategy, lengths = read_step(tokens_are_sharded=is_shard)
        our_layout = mo.Layout(strategy, runner.routed_experts.groups, tokens_are_sharded=is_shard)
        ours = mo.prepare(x, logits, our_layout, lengths)
        our_end = mo.finalize(ours.hidden_states.clone(), ours.state, our_layout)
    return [
        (out.hidden_states, out.router_logits, out.mc2_mask, end),
        (ours.hidden_states, ours.router_logits, ours.mask, our_end),
    ]


def tokens_of(rank: int, layout: Layout, tokens: Sequence[Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
    """Those that the model hands to this rank: of its DP rank, or its part of them."""
    pair = tokens[rank // layout.tp]
    return [_shard(x, layout, rank) for x in pair] if layout.is_sequence_parallel else pair


def _shard(x: torch.Tensor, layout: Layout, rank: int) -> torch.Tensor:
    rows = -(-len(x) // layout.tp)
    padded = torch.cat([x, x.new_zeros(rows * layout.tp - len(x), x.shape[1])])
    return padded[rank % layout.tp * rows :][:rows]


def step(config: Any, method: str, rank: int, layout: Layout, tokens: Sequence[Sequence[torch.Tensor]]) -> ExitStack:
    """A forward context as vllm-ascend's model runner fills it."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm_ascend.ascend_forward_context import _EXTRA_CTX, MoECommType

    counts = torch.tensor([len(x) for x, _ in tokens])
    num_tokens = int(counts[rank // layout.tp])
    across_dp = counts if layout.dp > 1 else None
    stack = ExitStack()
    stack.enter_context(set_current_vllm_config(config))
    stack.enter_context(set_forward_context(None, config, num_tokens=num_tokens, num_tokens_across_dp=across_dp))
    longest = int(counts.max())
    padded = -(-longest // layout.tp) * layout.tp
    _EXTRA_CTX.moe_comm_type = MoECommType[method]
    _EXTRA_CTX.max_tokens_across_dp = longest
    _EXTRA_CTX.padded_num_tokens = _EXTRA_CTX.padded_length = padded
    _EXTRA_CTX.mc2_mask = torch.arange(padded) < num_tokens
    _EXTRA_CTX.in_profile_run = False
    return stack


def reasons_of(rank: int, cases: Sequence[dict[str, Any]], weights: Sequence[torch.Tensor]) -> list[str | None]:
    """Why a layer is left to vllm-ascend once attributes of it are changed; for each case, from the same layer on."""
    prepare_process()
    from vllm.config import set_current_vllm_config

    from moe_ops.integrations.vllm_ascend.routed_experts import why_not

    runner, config = runner_of(rank, Layout(1, 1), *weights)
    reasons = []
    for changes in cases:
        with ExitStack() as stack, set_current_vllm_config(config):
            for path, value in changes.items():
                *owners, name = path.split(".")
                owner = runner.routed_experts
                for attribute in owners:
                    owner = getattr(owner, attribute)
                stack.callback(setattr, owner, name, getattr(owner, name, None))  # mock.patch does not know modules
                setattr(owner, name, value)
            reasons.append(why_not(runner.routed_experts))
    return reasons


def run_left_layer(rank: int, weights: Sequence[torch.Tensor]) -> Any:
    """What a layer that is left to vllm-ascend calls, once and with what."""
    prepare_process()
    from vllm_ascend.ops.fused_moe.routed_experts import AscendRoutedExperts

    experts = runner_of(rank, Layout(1, 1), *weights)[0].routed_experts
    experts.mix_placement = True
    with mock.patch.object(AscendRoutedExperts, "forward_impl", return_value="theirs") as forward:
        result = experts.forward_impl(hidden_states=1, router_logits=2, input_ids=3)
    return result, forward.call_args.kwargs


def run_with_milestones(rank: int, weights: Sequence[torch.Tensor], tokens: Any) -> bool:
    """Whether shared experts, which overlap, are told of points inside the routed ones."""
    prepare_process()
    runner, config = runner_of(rank, Layout(1, 1), *weights)
    experts = runner.routed_experts
    experts.return_with_event = True
    with step(config, "ALLGATHER", rank, Layout(1, 1), tokens):
        _, milestones = experts.forward_impl(hidden_states=tokens[0][0], router_logits=tokens[0][1])
    return milestones.has_fine_grained_stage_events


def step_of(rank: int, method: str, **context: Any) -> Any:
    """What `read_step` makes of a context, or the error."""
    prepare_process()
    from vllm_ascend.ascend_forward_context import MoECommType

    from moe_ops.integrations.vllm_ascend import step as module

    values = types.SimpleNamespace(moe_comm_type=MoECommType[method], **context)
    with mock.patch.object(module, "_EXTRA_CTX", values):
        try:
            return tuple(module.read_step(tokens_are_sharded=False))  # of a class that others can unpickle
        except ValueError as error:
            return str(error)


def methods(rank: int) -> tuple[list[str], list[str]]:
    """All communication methods of vllm-ascend, and those that have a strategy here."""
    prepare_process()
    from vllm_ascend.ascend_forward_context import MoECommType

    from moe_ops.integrations.vllm_ascend.step import STRATEGIES

    return [method.name for method in MoECommType], [method.name for method in STRATEGIES]


def register_in(rank: int, found_version: str, asked: str, registered: str) -> tuple[str | None, str]:
    """What `register` says, and what is registered after it."""
    prepare_process()
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm_ascend.ops.fused_moe.routed_experts import AscendRoutedExperts

    from moe_ops.integrations.vllm_ascend import install

    before = {"theirs": {"RoutedExperts": AscendRoutedExperts}, "nothing": {}, "another": {"RoutedExperts": dict}}
    with (
        mock.patch.dict(op_registry_oot, before[registered], clear=True),
        mock.patch.dict(os.environ, MOE_OPS_VLLM=asked),
        mock.patch.object(install, "version", return_value=found_version),
    ):
        error = None
        try:
            install.register()
            install.register()
        except RuntimeError as raised:
            error = str(raised)
        return error, getattr(op_registry_oot.get("RoutedExperts"), "__name__", "nothing")


def make_worker(rank: int) -> list[str]:
    """What the worker's constructor does, in order, over a stand-in for vllm-ascend's worker (which needs more than mocks)."""
    prepare_process()
    order: list[str] = []
    theirs = types.ModuleType("vllm_ascend.worker.worker")
    theirs.NPUWorker = type("NPUWorker", (), {"__init__": lambda self, config: order.append(f"theirs {config}")})
    with mock.patch.dict(sys.modules, {theirs.__name__: theirs}):
        from moe_ops.integrations.vllm_ascend import worker

        with mock.patch.object(worker, "register", side_effect=lambda: order.append("ours")):
            worker.Worker(config=1)
    return order


def plugin_and_vllm_ascend(rank: int, device_type: str) -> tuple[str, str]:
    """What vLLM's plugin registers as a runner, and what vllm-ascend then says as it registers its own."""
    prepare_process()
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.platforms import current_platform
    from vllm_ascend import utils

    from moe_ops.integrations import vllm as plugin

    with (
        mock.patch.dict(op_registry_oot, clear=True),
        mock.patch.object(type(current_platform), "device_type", device_type),
        mock.patch.object(utils, "_ASCEND_CUSTOMOP_IS_REIGISTERED", False),
    ):
        plugin.register()
        runner = getattr(op_registry_oot.get("MoERunner"), "__name__", "nothing")
        try:
            utils.register_ascend_customop()
        except AssertionError as error:
            return runner, str(error)
        return runner, op_registry_oot["MoERunner"].__name__
