"""Helpers that know no tensors: the config schema, files, and words for the console."""
