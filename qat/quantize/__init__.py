"""Grids, rounding, plans and the switch: what values a weight may take; imports torch alone."""
