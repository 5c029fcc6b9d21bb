"""Shapes of the ops of integrations."""
