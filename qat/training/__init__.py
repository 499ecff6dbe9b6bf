"""Joins language and quantization: LightningModule, optimizers, schedule, clock, switch."""
