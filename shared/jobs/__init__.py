"""Jobs: their states, their rows, and the only code that changes them."""
