from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch_npu
import torchair

from .ge_graphs import attribute_value
from .stand_in import build, load

c10d = torch.ops._c10d_functional
SOC_VERSIONS = {"Ascend910_9391": 250, "Ascend950PR_9589": 260}


def plus_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def with_value(x: torch.Tensor) -> torch.Tensor:
    return x + x.sum().item()


def collectives(x: torch.Tensor, size: int, name: str) -> list[torch.Tensor]:
    """Every collective that a strategy may use, ragged all-to-all among them, for rows that `size` divides."""
    even = [x.shape[0] // size] * size
    ragged = [even[0] + 1, *even[2:], even[0] - 1]
    started = [
        c10d.all_gather_into_tensor(x, size, name),
        c10d.reduce_scatter_tensor(x, "sum", size, name),
        c10d.all_reduce(x, "sum", name),
        c10d.all_to_all_single(x, even, even, name),
        c10d.all_to_all_single(x, ragged, even, name),
    ]
    return [c10d.wait_tensor(y) for y in started]


LAUNCHED = ["HcclAllGather", "HcclReduceScatter", "HcclAllReduce", "HcclAlltoAllV", "HcclAlltoAllV"]


class TestDevice:
    def test_is_the_chip_that_was_asked_for(self, chip):
        assert torch.npu.get_device_name() == chip
        assert torch_npu.npu.get_soc_version() == SOC_VERSIONS[chip]

    def test_copies_are_real(self):
        x = torch.randn(33, 7, generator=torch.Generator().manual_seed(0))
        assert torch.equal(x.npu().cpu(), x)

    def test_lists_what_is_launched(self, stand_in):
        x = torch.zeros(4, 4).npu()
        assert stand_in.launches_during(lambda: plus_one(x) @ x) == ["aclnnAdds", "aclnnMatmul"]

    def test_a_size_that_depends_on_values_is_an_error(self):
        with pytest.raises(RuntimeError, match="aclGetViewShape"):
            torch.ones(3).npu().nonzero()

    def test_host_side_of_a_moe_op(self):
        x, experts = torch.zeros(16, 512, dtype=torch.bfloat16).npu(), torch.zeros(16, 8, dtype=torch.int32).npu()
        rows = torch.ops.npu.npu_moe_distribute_dispatch_v2(x, experts, "name", 8, 0, 64, shared_expert_num=0)[0]
        assert rows.shape == (16 * 8 * 8, 512)  # 16 tokens from each of 8 ranks, for 8 local experts


class TestCapture:
    def test_captures_and_replays_are_counted(self, stand_in):
        x = torch.zeros(4).npu()
        graph, captures, replays = torch.npu.NPUGraph(), stand_in.captures, stand_in.replays
        assert not torch.npu.is_current_stream_capturing()
        with torch.npu.graph(graph):
            assert torch.npu.is_current_stream_capturing()
            y = plus_one(x)
        assert not torch.npu.is_current_stream_capturing()
        assert y.shape == x.shape
        assert (stand_in.captures - captures, stand_in.replays - replays) == (1, 0)
        graph.replay()
        graph.replay()
        assert (stand_in.captures - captures, stand_in.replays - replays) == (1, 2)

    def test_waiting_for_the_device_is_refused(self, stand_in):
        x, refusals = torch.zeros(4).npu(), stand_in.refusals
        with_value(x)  # allowed outside
        assert stand_in.refusals == refusals
        with pytest.raises(RuntimeError, match="107030"), torch.npu.graph(torch.npu.NPUGraph()):
            with_value(x)
        assert stand_in.refusals == refusals + 1
        with_value(x)  # and allowed again

    @pytest.mark.parametrize(
        "wait",
        [
            pytest.param(torch.npu.synchronize, id="device"),
            pytest.param(lambda: torch.npu.current_stream().synchronize(), id="stream"),
            pytest.param(lambda: torch.npu.current_stream().record_event().synchronize(), id="event"),
            pytest.param(lambda: torch.zeros(4).npu(), id="copy"),
        ],
    )
    def test_other_ways_to_wait_are_refused(self, wait):
        with pytest.raises(RuntimeError, match="107030"), torch.npu.graph(torch.npu.NPUGraph()):
            wait()

    @pytest.mark.parametrize("joins", [True, False])
    def test_a_side_stream_must_join(self, joins):
        x, side = torch.zeros(4).npu(), torch.npu.Stream()

        def capture() -> None:
            with torch.npu.graph(torch.npu.NPUGraph()):
                side.wait_stream(torch.npu.current_stream())
                with torch.npu.stream(side):
                    assert torch.npu.is_current_stream_capturing()
                    plus_one(x)
                if joins:
                    torch.npu.current_stream().wait_stream(side)

        if joins:
            capture()
        else:
            with pytest.raises(RuntimeError, match="107025"):
                capture()


class TestHccl:
    """World of 8; groups of 2 and 4 are neighbours: rank 5 is the second of (4, 5) and of (4, 5, 6, 7)."""

    @pytest.mark.parametrize("rank", [0, 5])
    def test_groups(self, hccl_groups, communicator_name, rank):
        groups = hccl_groups(rank=rank)
        assert {size: (group.size(), group.rank()) for size, group in groups.items()} == {
            size: (size, rank % size) for size in (8, 2, 4)
        }
        names = [communicator_name(group) for group in groups.values()]
        assert len(set(names)) == 3
        assert [communicator_name(group) for group in groups.values()] == names

    @pytest.mark.parametrize("rank", [0, 5])
    @pytest.mark.parametrize("size", [2, 4, 8])
    def test_collectives_eager_and_captured(self, hccl_groups, stand_in, rank, size):
        name = hccl_groups(rank=rank)[size].group_name
        x = torch.zeros(8, 3).npu()

        def capture() -> None:
            with torch.npu.graph(torch.npu.NPUGraph()):
                collectives(x, size, name)

        for call in (lambda: collectives(x, size, name), capture):
            assert [launch for launch in stand_in.launches_during(call) if launch.startswith("Hccl")] == LAUNCHED
        assert [y.shape[0] for y in collectives(x, size, name)] == [8 * size, 8 // size, 8, 8, 8]

    def test_device_mesh(self, hccl_groups, communicator_name):
        hccl_groups(rank=5, sizes=())
        mesh = dist.init_device_mesh("npu", (2, 2, 2), mesh_dim_names=("dp", "pcp", "tp"))
        assert tuple(mesh.get_coordinate()) == (1, 0, 1)
        assert len({communicator_name(mesh.get_group(name)) for name in ("dp", "pcp", "tp")}) == 3


class TestGe:
    def test_graph(self, ge):
        x, w = torch.randn(6, 4), torch.randn(4, 4)

        def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x.new_zeros(-x.shape[0] % 4, x.shape[1])]) @ w.t()

        result, graph = ge(function, x, w)
        torch.testing.assert_close(result, function(x, w))
        assert graph.types[0] == "Data"
        assert graph.types[-1] == "NetOutput"
        assert "Shape" in graph.types
        assert graph.compute_types == ["Fill", "ConcatV2", "Transpose", "MatMul"]
        product = graph.node("MatMul")
        assert product.inputs == ("ConcatV2", "Transpose", None)
        assert (product.num_inputs, product.num_outputs) == (3, 1)
        assert product.attributes == {"transpose_x1": False, "transpose_x2": False}

    def test_own_backend(self, ge):
        config = torchair.CompilerConfig()
        config.debug.run_eagerly = True
        backend = torchair.get_npu_backend(
            compiler_config=config, custom_decompositions={torch.ops.aten.relu.default: torch.neg}
        )
        _, graph = ge(torch.relu, torch.randn(4), backend=backend, dynamic=False)
        assert graph.compute_types == ["Neg"]

    def test_collectives(self, ge, hccl_groups, communicator_name):
        group = hccl_groups()[4]
        _, graph = ge(lambda x: collectives(x, 4, group.group_name), torch.zeros(8, 3).npu(), dynamic=False)
        for type, rank_size in (("HcomAllGather", 4), ("HcomReduceScatter", 4)):
            assert graph.node(type).attributes["rank_size"] == rank_size
        used = {node.attributes["group"] for node in graph.all_nodes if node.type.startswith("Hcom")}
        assert used == {communicator_name(group)}

    def test_attributes(self):
        from torchair.ge._ge_graph import GeGraph as Definition

        op = Definition().op.add(name="op", type="Op")
        op.attr["text"].s = b"sum"
        op.attr["whole"].i = -1
        op.attr["real"].f = 0.5
        op.attr["flag"].b = True
        op.attr["dtype"].dt = 1
        op.attr["wholes"].list.val_type = 2
        op.attr["wholes"].list.i.extend([3, 0])
        op.attr["nothing"].list.val_type = 2
        op.attr["texts"].list.s.extend([b"a"])
        assert {name: attribute_value(attribute) for name, attribute in op.attr.items()} == {
            "text": "sum",
            "whole": -1,
            "real": 0.5,
            "flag": True,
            "dtype": 1,
            "wholes": [3, 0],
            "nothing": [],
            "texts": ["a"],
        }


class TestNpugraphEx:
    def test_right_results_on_a_cpu(self, npugraph_ex):
        x = torch.randn(4, 8)
        result, _ = npugraph_ex(plus_one, x, force_eager=True)
        assert torch.equal(result, x + 1)

    def test_captures_once_and_replays(self, npugraph_ex, stand_in):
        captures, replays = stand_in.captures, stand_in.replays
        result, _ = npugraph_ex(plus_one, torch.zeros(4, 8).npu(), calls=3)
        assert result.shape == (4, 8)
        # The first of the two captures is empty: it makes the memory pool.
        assert (stand_in.captures - captures, stand_in.replays - replays) == (2, 3)

    def test_refuses_a_host_read(self, npugraph_ex):
        with torch.library._scoped_library("npu_tests", "FRAGMENT") as library:
            library.define("with_value(Tensor x) -> Tensor")
            library.impl("with_value", with_value, "CompositeExplicitAutograd")
            torch.library.register_fake("npu_tests::with_value", torch.empty_like, lib=library)
            with pytest.raises(RuntimeError, match="107030"):
                npugraph_ex(torch.ops.npu_tests.with_value, torch.zeros(4).npu())


class TestBuild:
    @pytest.mark.parametrize(("tool", "package"), [("gcc", "gcc"), ("nm", "binutils"), ("strings", "binutils")])
    def test_a_missing_tool_is_named(self, tmp_path, monkeypatch, tool, package):
        for other in {"gcc", "nm", "strings"} - {tool}:
            (tmp_path / other).write_text("#!/bin/sh\n")
            (tmp_path / other).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(RuntimeError, match=f"and {tool} cannot be found: install {package}$"):
            build.build_libraries(tmp_path / "cache")

    def test_another_process_was_first(self, tmp_path, monkeypatch):
        def compile_late(folder: Path) -> None:
            monkeypatch.setattr(build, "_compile", lambda folder: (folder / "theirs").touch())
            build.build_libraries(tmp_path)
            (folder / "ours").touch()

        monkeypatch.setattr(build, "_compile", compile_late)
        folder = build.build_libraries(tmp_path)
        assert [path.name for path in folder.iterdir()] == ["theirs"]
        assert list(tmp_path.iterdir()) == [folder]

    def test_nothing_is_left_of_a_failed_build(self, tmp_path, monkeypatch):
        monkeypatch.setattr(build, "COMPILER", ("gcc", "--no-such-option"))
        with pytest.raises(RuntimeError, match=r"gcc --no-such-option .* failed:\n.*no-such-option"):
            build.build_libraries(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_unknown_chip(self, monkeypatch):
        monkeypatch.setenv("CANN_STAND_IN_SOC", "Ascend1")
        with pytest.raises(ValueError, match=r"CANN_STAND_IN_SOC must be one of .*, got 'Ascend1'"):
            load()
