"""What others enter, one file a peer. Each imports its package when it is built, so that none has to be installed."""

from benchmarks.peers import torch_grouped, torchtitan, transformers, vllm_cpu

EXPERTS_ENTRIES = (torch_grouped.EXPERTS, transformers.EXPERTS, torchtitan.EXPERTS, vllm_cpu.EXPERTS)
STAGE_ENTRIES = (torchtitan.STAGE,)
