"""Helpers without tensors: settings, files, and output to the console."""
