"""Inference: from images to proposals, from proposals to detections, and what they are kept in."""
