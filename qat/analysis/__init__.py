"""``eval=full``: reliability, damage by tier and tensor, minimal pairs, cost."""
