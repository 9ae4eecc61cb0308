"""The laboratory: recipes, data, trainer, evaluation, checkpoints, command line."""
