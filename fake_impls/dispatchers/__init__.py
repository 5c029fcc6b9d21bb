"""Shapes of dispatch and combine, one file a kind."""
