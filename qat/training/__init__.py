"""Joins language and quantization: the LightningModule, its optimizers, schedule, clock and switch."""
