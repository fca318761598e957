"""Measures images. Metrics know nothing of training: the commands hand them images, by number."""
