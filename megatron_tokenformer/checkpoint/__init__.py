"""Checkpoints as intervals of flattened parameters: written by any layout, read by any other, and grown."""
