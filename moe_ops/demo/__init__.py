"""The demo: MoE blocks of real model families on four gloo ranks, compiled, against `transformers` on one process.

run -> families (the blocks and the expected results, by transformers) -> ranks (the same through moe_ops) -> report
"""
