"""One file per task: how examples become batches, what the loss is, how answers are judged."""
