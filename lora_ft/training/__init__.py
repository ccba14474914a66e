"""Training: order, micro-batches, rate, step, checkpoint."""
