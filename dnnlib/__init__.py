"""Helpers without tensors: settings, files, and output to the console."""

import os
import sys

try:
    os.getcwd()
except FileNotFoundError:  # importing PyTorch would abort
    print("Error: the current folder has been removed; change to another one", file=sys.stderr)
    sys.exit(2)
