"""Counts the nodes of an MLX graph, and of them the kernels that a GPU would run."""

import io
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

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


@contextmanager
def opaque_kernels() -> Generator[None]:
    """Graphs as a GPU has them: a norm, RoPE and attention are one node each, which nothing is fused with.

    The CPU device composes them of many. The nodes compute nothing, so what is built here is for counting alone.
    Functions that were compiled before keep the graph that they were traced with.
    """
    import mlx.core as mx

    def node(x: Any, *others: Any) -> Any:
        return mx.depends(x, [other for other in others if isinstance(other, mx.array)] or [x])

    def norm(x: Any, weight: Any, eps: float) -> Any:
        return node(x, weight)

    def rope(x: Any, *_: Any, offset: Any, freqs: Any = None, **__: Any) -> Any:
        return node(x, offset, freqs)

    def attention(queries: Any, keys: Any, values: Any, *, mask: Any = None, **_: Any) -> Any:
        return node(queries, keys, values, mask)

    with mock.patch.multiple(mx.fast, rms_norm=norm, rope=rope, scaled_dot_product_attention=attention):
        yield
