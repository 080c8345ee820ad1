"""What runs between a prompt and its tokens; it knows ids, no text."""
