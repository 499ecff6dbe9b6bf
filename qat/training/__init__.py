"""The LightningModule, optimizers, schedule, clock, liveness and checkpoints."""
