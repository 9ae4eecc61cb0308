"""What runs the steps of a plan: PyTorch (the reference), the C++ kernels, the Triton and CUDA kernels."""
