"""`moe-ops plan`: what each form of a model's MoE layer sends on a topology, how long that takes, and which to choose.

options -> models, ranks (a calibration on this machine) -> plans (routing, load, costs, choice) -> report, plot
"""
