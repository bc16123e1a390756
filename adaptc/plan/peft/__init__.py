"""PEFT's ``adapter_config.json`` as a source of plans, and plans as such a file."""
