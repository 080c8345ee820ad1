"""A checkpoint folder of any layout: found, opened, checked and read under one set of names."""
