"""The demo over vLLM: a tiny Qwen3-MoE served on two ranks with the plugin, against vLLM itself on one.

run (starts both, compares) -> checkpoint (the model), environment -> engine (one program that uses vLLM, with or without the
plugin)
"""
