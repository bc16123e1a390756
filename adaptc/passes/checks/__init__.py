"""What is checked between passes: structure, values against fp64, and that a pass changed only what it says."""
