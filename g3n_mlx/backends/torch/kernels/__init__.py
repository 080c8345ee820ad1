"""Products of PyTorch with quantized weights."""
