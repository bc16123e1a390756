"""Rewrites of captured graphs, one per file, and the manager that runs them."""
