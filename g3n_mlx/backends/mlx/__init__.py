"""The MLX backend: Metal, CUDA (`mlx[cuda13]`) and Linux CPU."""
