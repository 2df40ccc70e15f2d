"""Training: the stages, the loop that trains them, and its log."""
