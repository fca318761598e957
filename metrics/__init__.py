"""Measure images. Metrics know nothing about training: the commands pass them images, by number."""
