"""From messages to token ids: the tokenizer, the chat template and the prompt they make."""
