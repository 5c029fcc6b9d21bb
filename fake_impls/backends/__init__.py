"""Shapes of the ops that call other libraries' kernels."""
