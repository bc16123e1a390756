"""Writing into the base's own weights, and what undoes it."""
