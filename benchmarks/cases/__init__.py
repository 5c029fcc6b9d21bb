"""The cases, one file a question."""

from benchmarks.cases import (
    compiled,
    eager,
    experts,
    graphs,
    host,
    overlap,
    packing,
    profile,
    serving,
    stage,
    tracing,
    training,
    volume,
)

PREPARE_FINALIZE = {
    case.name: case for case in (eager.CASE, compiled.CASE, packing.CASE, graphs.CASE, volume.CASE, tracing.CASE)
}
STAGE = {case.name: case for case in (experts.CASE, stage.CASE, training.CASE, overlap.CASE, host.CASE, profile.CASE)}
SERVING = {case.name: case for case in (serving.CASE,)}
