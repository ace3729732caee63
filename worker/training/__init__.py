"""Fine-tuning: data sets, labels, recipes, runs and their checkpoints, and scores."""
