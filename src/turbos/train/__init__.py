"""Training: the two verbs, optimizer, checkpoints, and the runs of pretraining and SFT that share one loop."""
