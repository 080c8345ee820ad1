"""Offline batches: many requests from a file, answered on this machine or on a Ray cluster.

`Worker` is what a cluster's nodes run, and may be used in any pipeline of Ray Data. Nothing heavy is imported here.
"""

from g3n_mlx.batch.worker import Worker

__all__ = ["Worker"]
