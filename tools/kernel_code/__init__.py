"""Compile the Triton kernels without a GPU and list their code."""
