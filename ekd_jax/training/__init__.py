"""Runs a `Method`: devices, steps, optimizers, checkpoints and the loop."""
