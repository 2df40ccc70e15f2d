"""Torch7 files: a reader for the format, and converters for the networks released in it."""
