"""MatFormer slices: the tables that name them, and what each keeps of a checkpoint."""
