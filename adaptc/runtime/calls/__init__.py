"""What happens at a call of a compiled model: the prologue, captured graphs, blocks."""
