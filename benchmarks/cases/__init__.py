"""The cases, one file a question."""

from benchmarks.cases import compiled, eager, graphs, packing, tracing, volume

CASES = {case.name: case for case in (eager.CASE, compiled.CASE, packing.CASE, graphs.CASE, volume.CASE, tracing.CASE)}
