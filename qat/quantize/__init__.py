"""Grids, plans and the straight-through switch: tensors only, imports torch alone."""
