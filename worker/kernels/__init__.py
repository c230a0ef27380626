"""Arithmetic below the families: what has, or may get, a kernel of its own beside plain torch."""
