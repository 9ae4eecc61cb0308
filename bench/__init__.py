"""Measurements: each writes a JSON file into results/, and report writes the README's tables from those files."""
