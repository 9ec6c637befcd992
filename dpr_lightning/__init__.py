"""Dense-Path REINFORCE: a better policy from the same demonstrations (arXiv 2510.02493)."""

__version__ = "0.1.0"
