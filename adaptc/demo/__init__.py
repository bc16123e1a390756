"""The demonstration behind ``adaptc demo``: a pretrained sentence encoder learns to tell topics apart."""
