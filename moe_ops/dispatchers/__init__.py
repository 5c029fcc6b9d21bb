"""Dispatch and combine, one file a kind: rows go to the ranks and groups of their experts, and results come back."""
