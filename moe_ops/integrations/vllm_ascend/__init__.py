"""vllm-ascend's MoE layers through this library, off unless ``MOE_OPS_VLLM=1``: a worker for ``--worker-cls``.

vllm-ascend registers its layers when its worker is made, after vLLM has loaded plugins, and refuses a name that is taken. So a
plugin comes too early; what comes after is the constructor of a worker, which vLLM lets the user name. See `worker`.
"""
