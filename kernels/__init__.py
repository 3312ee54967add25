"""What an expert computes: a reference in plain torch, one Triton operation a file, the face of the C++ kernels."""
