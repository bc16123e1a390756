"""Adapter folders: written, read, checked."""
