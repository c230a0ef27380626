"""The REST API: accepts jobs, shows them, and never does model work."""

import gc

# What is imported stays, and what requests leave behind hardly ever holds itself: garbage is looked for less often
# than after each 700 objects, which took an eighth of the time that the import took.
gc.set_threshold(50_000, 10, 10)
