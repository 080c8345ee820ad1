"""Kernels in C for processors: built with the package where there is a compiler, absent elsewhere."""
