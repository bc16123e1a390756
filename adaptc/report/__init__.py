"""What was compiled, told to the user."""
