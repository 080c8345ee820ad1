"""`g3n transcribe`: audio files to their words."""
