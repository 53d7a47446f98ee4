"""Compiles the Triton kernels without a GPU and lists their code."""
