"""LoRA at every kind of site, and DoRA."""
