"""Every post-training method as a variant of one frozen model: what QAT has to beat."""
