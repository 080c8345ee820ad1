"""Counts the nodes of an MLX graph."""

import io
import re
from typing import Any

# Graph nodes that describe memory anew and launch no kernel.
MLX_VIEWS = frozenset(
    {"AsStrided", "Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "StopGradient"}
    | {"Transpose", "Unflatten", "View"}
)


def count_graph(output: Any) -> tuple[int, int]:
    """All nodes, and those that are not mere views, of the graph that an MLX array waits for."""
    import mlx.core as mx

    dot = io.StringIO()
    mx.export_to_dot(dot, output)
    names = re.findall(r'label ="(\w+)", shape=rectangle', dot.getvalue())
    return len(names), sum(name not in MLX_VIEWS for name in names)
