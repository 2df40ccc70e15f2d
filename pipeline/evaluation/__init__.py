"""Evaluation: recall of proposals, precision of detections, patch metrics, and their tables."""
