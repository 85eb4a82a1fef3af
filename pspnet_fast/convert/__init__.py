"""Checkpoints of other packages, as models of this one. See docs/convert.md."""
