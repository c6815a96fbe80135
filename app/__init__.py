"""Task Queue Worker API: long work in the background for anyone who speaks HTTP."""

__version__ = "0.1.0"
