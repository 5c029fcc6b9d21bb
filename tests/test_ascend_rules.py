"""The rules that vllm-ascend publishes for each family of devices."""

from collections.abc import Callable

import pytest

from moe_ops import Dispatch, Strategy
from moe_ops.backends import npu_mc2
from moe_ops.backends.ascend_rules import MC2_ROWS, DeviceFamily, mc2_capacity, select_by_device

A2, A3, A5, P310 = DeviceFamily.A2, DeviceFamily.A3, DeviceFamily.A5, DeviceFamily.ASCEND_310P
GATHER = Strategy.ALLGATHER, Dispatch.LOCAL
EXCHANGE = Strategy.ALL2ALL, Dispatch.ALL_TO_ALL
MC2 = Strategy.MC2, Dispatch.FIXED_CAPACITY

# device, tokens, capacity, experts, top-k, EP, world, options -> the published choice
RULES = [
    (A2, 100, 512, 256, 8, 1, 1, {}, GATHER),  # no expert parallelism
    (A3, 100, 512, 256, 8, 1, 16, {}, GATHER),
    (A2, 100, 512, 256, 8, 16, 16, {"has_lora": True}, EXCHANGE),
    (P310, 100, 512, 256, 8, 2, 2, {"has_lora": True}, EXCHANGE),
    (A3, 100, 512, 256, 8, 1, 1, {"has_lora": True}, GATHER),
    (A2, 512, 512, 384, 8, 16, 16, {}, MC2),  # 24 experts a rank, EP 16, just fits
    (A2, 513, 512, 384, 8, 16, 16, {}, GATHER),
    (A2, 512, 512, 400, 8, 16, 16, {}, GATHER),  # 25 experts a rank
    (A2, 512, 512, 120, 8, 15, 15, {}, GATHER),  # EP 15
    (A2, None, 0, 256, 8, 16, 32, {}, MC2),  # not known: fits
    (A2, 1, 512, 256, 8, 8, 32, {}, GATHER),  # EP decides, not the world
    (A3, 512, 512, 256, 8, 16, 16, {}, MC2),
    (A3, 513, 512, 256, 8, 16, 16, {}, EXCHANGE),
    (A3, None, 0, 256, 8, 2, 2, {}, MC2),
    (A3, 9999, 512, 256, 8, 32, 32, {"has_fused_mc2": True}, MC2),
    (A3, 9999, 512, 256, 8, 33, 33, {"has_fused_mc2": True}, EXCHANGE),
    (A3, 512, 512, 256, 8, 33, 33, {"has_fused_mc2": True}, MC2),
    (A3, 9999, 512, 256, 8, 64, 64, {"has_fused_mc2": True, "has_mega_moe": True}, MC2),
    (A3, 9999, 512, 256, 8, 65, 65, {"has_fused_mc2": True, "has_mega_moe": True}, EXCHANGE),
    (A3, 9999, 512, 256, 8, 16, 16, {"has_mega_moe": True}, EXCHANGE),  # there, but not enabled
    (A5, 512, 512, 256, 8, 4, 4, {}, MC2),
    (A5, 513, 512, 256, 8, 8, 8, {}, GATHER),  # no more ranks than choices
    (A5, 513, 512, 256, 8, 9, 9, {}, EXCHANGE),
    (A5, 513, 512, 256, 8, 8, 16, {}, EXCHANGE),  # two pipeline stages: the world decides
    (A5, 9999, 512, 256, 8, 16, 16, {"has_fused_mc2": True}, EXCHANGE),  # A3 alone has it
    (P310, 1, 512, 8, 2, 4, 4, {}, GATHER),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0].value}-{rule[1]}-E{rule[3]}-EP{rule[5]}-W{rule[6]}")
def test_published_rules(rule: tuple) -> None:
    device, tokens, capacity, experts, top_k, ep, world, options, expected = rule
    choice = select_by_device(
        device,
        num_tokens=tokens,
        capacity=capacity,
        num_experts=experts,
        top_k=top_k,
        ep_size=ep,
        world_size=world,
        **options,
    )
    assert choice[:2] == expected
    assert choice.reason


@pytest.mark.parametrize(
    ("device", "tokens", "tp", "mega", "capacity"),
    [
        (A2, 0, 4, False, 0),
        (A2, 1, 4, False, 4),
        (A2, 1024, 4, False, 1024),
        (A2, 1025, 4, False, 1024),  # 256 rows a rank
        (A3, 1025, 4, False, 1028),
        (A3, 2049, 4, False, 2048),  # 512
        (A5, 513, 1, False, 512),
        (A3, 9000, 2, True, 8192),  # 4096
    ],
)
def test_mc2_capacity(device: DeviceFamily, tokens: int, tp: int, mega: bool, capacity: int) -> None:
    assert mc2_capacity(device, tokens, tp_size=tp, has_mega_moe=mega) == capacity


def test_the_fused_exchange_takes_the_rows_that_plans_say() -> None:
    assert MC2_ROWS[A3] == MC2_ROWS[A5] == npu_mc2.MAX_ROWS


def by_device(**changes: int) -> Callable[[], object]:
    sizes = {"num_tokens": 1, "capacity": 1, "num_experts": 8, "top_k": 2, "ep_size": 2, "world_size": 2}
    return lambda: select_by_device(A3, **(sizes | changes))


ERRORS = {
    "select_by_device: ep_size must be at least 1, got 0": by_device(ep_size=0),
    "select_by_device: capacity must be at least 0, got -1": by_device(capacity=-1),
    "mc2_capacity: device must be one with MC2, got ASCEND_310P": lambda: mc2_capacity(P310, 1, tp_size=1),
    "mc2_capacity: num_tokens must be at least 0, got -1": lambda: mc2_capacity(A2, -1, tp_size=1),
    "mc2_capacity: tp_size must be at least 1, got 0": lambda: mc2_capacity(A2, 1, tp_size=0),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()
