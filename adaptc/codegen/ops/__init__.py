"""What the ops of the dialect become: their kernels, and their lowerings for what no kernel takes."""
