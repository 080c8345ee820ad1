"""Offline batches: many requests from a file, answered on this machine."""
