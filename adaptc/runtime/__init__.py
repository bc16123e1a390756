"""What happens between graphs: attaching adapters to a model, calling it, switching, files."""
