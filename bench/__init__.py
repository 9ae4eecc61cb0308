"""Measurements: each writes a JSON file into results/, and report writes the README's tables from those files."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler announces itself on every start; read at import
