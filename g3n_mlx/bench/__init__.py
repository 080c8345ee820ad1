"""How fast a model loads, reads and writes here, beside a peer if asked."""
