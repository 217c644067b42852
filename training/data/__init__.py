"""Subjects on disk: made, imported, read and sampled."""
