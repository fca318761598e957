"""Tensor operations, each a plain PyTorch function that is differentiable twice."""
