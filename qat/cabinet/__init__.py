"""The cabinet: every post-training method as a variant of one frozen model."""
