"""Helpers that know tensors and no GANs."""
