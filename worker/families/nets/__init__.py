"""Layers and arithmetic that families are built of. Knows no family and no engine."""
