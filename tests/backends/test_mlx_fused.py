"""What is one kernel on a GPU: compiled for any length, it is what the function says, without a trace per length."""

import io

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx

from g3n_mlx.backends.mlx import text, vision

WIDTH, STREAMS = 48, 4
# Shapes for T rows.
SHAPES = {
    "gelu": lambda rows: [(1, rows, 3, WIDTH)],
    "gated_by": lambda rows: [(rows, WIDTH)] * 2,
    "gaussian_topk": lambda rows: [(rows, WIDTH), ()],
    "corrected": lambda rows: [(rows, STREAMS, WIDTH), (rows, 1, WIDTH), (rows, 1, WIDTH), (rows, STREAMS, 1)],
    "updated": lambda rows: [(rows, STREAMS, WIDTH), (rows, 1, WIDTH), (STREAMS, 1)],
}


@pytest.mark.parametrize("name", SHAPES)
def test_compiled_for_any_length(name):
    function = getattr(vision if name == "gelu" else text, name).__wrapped__
    traces = []

    def traced(*arrays):
        traces.append(None)
        return function(*arrays)

    compiled = mx.compile(traced, shapeless=True)
    generator = np.random.default_rng(0)
    for rows in (5, 2, 9, 3, 7, 4):
        arrays = [mx.array(generator.standard_normal(shape).astype(np.float32)) for shape in SHAPES[name](rows)]
        np.testing.assert_allclose(np.array(compiled(*arrays)), np.array(function(*arrays)), rtol=1e-5, atol=1e-6)
    assert len(traces) <= 2


def test_a_gpu_gets_the_compiled_form(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    arrays = [mx.array(np.ones(shape, np.float32)) for shape in SHAPES["updated"](2)]
    assert "Compiled" in kinds(text.updated(*arrays))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu, 0))
    assert "Compiled" not in kinds(text.updated(*arrays))


def kinds(array):
    dot = io.StringIO()
    mx.export_to_dot(dot, array)
    return dot.getvalue()
