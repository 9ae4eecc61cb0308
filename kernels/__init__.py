"""Triton kernels, installed as ``twins_fast.kernels``."""
