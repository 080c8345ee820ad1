"""`g3n doctor`: what this machine, this installation and its caches offer to Gemma 3n."""
