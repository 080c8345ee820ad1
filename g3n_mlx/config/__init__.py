"""config.json as frozen dataclasses, one file per sub-model, and the names and shapes of the tensors they describe."""
