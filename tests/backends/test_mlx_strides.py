"""What a decode step's products read lies as MLX's GPU kernels ask: an axis of one row too has a row's stride.

They compare the strides of every axis with the shape (`ensure_row_contiguous_matrix`, `check_transpose`), also where an
axis has one entry, and copy what differs: 148 kernels of a decode step at E4B's layers before the active stream was
taken so that it passes.
"""

import numpy as np
import pytest
from devices import device_for

pytest.importorskip("mlx.core")

import mlx.core as mx

from g3n_mlx import load
from g3n_mlx.backends.mlx import layers
from g3n_mlx.engine.cache import Cache
from g3n_mlx.engine.runner import run
from g3n_mlx.rows import Rows


@pytest.mark.parametrize("quantized", [False, True])
def test_every_product_of_a_decode_step_reads_whole_rows(tiny_folder, quantized_folder, monkeypatch, quantized):
    model = load(
        quantized_folder if quantized else tiny_folder, backend="mlx", device=device_for("mlx"), dtype="float32"
    )
    wrong, seen = [], []

    def watched(kind):
        call = kind.__call__

        def watch(self, x):
            mx.eval(x)
            strides = np.array(x, copy=False).strides
            (seen if strides == np.zeros(x.shape, np.float32).strides else wrong).append(
                (kind.__name__, x.shape, strides)
            )
            return call(self, x)

        monkeypatch.setattr(kind, "__call__", watch)

    def step():
        network = model.runner.model
        cache = Cache(model.config.text, network.kv_arrays)
        run(network, [Rows(cache, np.arange(2, 9))])
        for kind in (layers.Linear, layers.QuantizedLinear):
            watched(kind)
        run(network, [Rows(cache, np.array([5]))])

    model.runner.call(step)
    assert len(seen) > 4 * model.config.text.num_hidden_layers
    assert not wrong
