"""Training code: recipes, data, trainer, run folders, command line."""
