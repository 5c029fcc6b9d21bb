"""Shapes of prepare and finalize, one file a strategy."""
