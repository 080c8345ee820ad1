"""Chat with Gemma 3n in a terminal, or ask it once."""
