"""The attack engine: a model's evaluation forward as an explicit program, and what runs its steps."""
