"""The report of a run: one page with its numbers, curves and pictures."""
