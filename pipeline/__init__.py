"""Pipeline: puts networks and data together (config, training loop, inference, evaluation)."""
