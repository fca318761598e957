"""Measures of pictures. They know nothing of networks: the commands hand them pictures, by number."""
