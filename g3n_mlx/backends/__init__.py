"""The two backends, mirrored file by file: equal classes, methods and parameter names, checked by a test.

What the pair is allowed to have differently:

| place | mlx | torch |
|---|---|---|
| every module | `__call__` | `forward` |
| RoPE | `mx.fast.rope` on [T, N, 1, H], angles in float32 | cos and sin in the activations' dtype, as published |
| attention | one kernel for all | in decode, heads of a group as rows of one query |
| decode step | compiled from one attention to the next (`steps.py`) | the layers' own forward |
| quantized products | `mx.quantized_matmul` | int4 kernels on a packed form; blocks of dequantized rows |
| quantized activations | float32 on the CPU device, where bf16 products are off by 5 % | the chosen dtype |
| rows of a KV cache | assigning to a slice makes a new array | writes in place |
| vision maps | [B, h, w, C] throughout, kernels turned at construction | so inside; [B, C, h, w] at the tower's ends |
| vision's 1 x 1 kernels | [I, O], turned at construction | [O, I] |
| vision's GELU | written out: `nn.gelu_approx` takes a power | `F.gelu` |

Names that one of them alone has:

- MLX reads how it multiplies from the environment: `__init__.py:ops_per_buffer`, `__init__.py:chip_name`,
  `__init__.py:configure`.
- MLX evaluates lazily: `weights.py:evaluated`; it has no log-softmax, and its CPU device adds in sequence, in float32:
  `sampling.py:log_softmax`, `sampling.py:cumulated`.
- Compiled decode steps, in halves of layers, whose graph is built before the token is known: `steps.py:Ahead`,
  `steps.py:between`, `steps.py:before_attention`, `steps.py:after_attention`, `steps.py:same`, `steps.py:moving`,
  `steps.py:DecodeSteps.compile`, `steps.py:DecodeSteps.forget`, `steps.py:DecodeSteps.started`,
  `steps.py:DecodeSteps.finished`, `steps.py:DecodeSteps.first`, `steps.py:DecodeSteps.last`,
  `steps.py:DecodeSteps.per_layer_inputs`, `text.py:LanguageModel.table_rows`, `text.py:LanguageModel.scaled_rows`,
  `text.py:LaurelBlock.added`, `text.py:Attention.decode_inputs`, `model.py:Gemma3nModel.decode_graph`.
- MLX fuses elementwise kernels of what is compiled: `layers.py:fused`, `text.py:corrected`, `text.py:gated_by`,
  `text.py:updated`.
- Several products of one row are one: `layers.py:stacked`.
- Views of one row keep strides that MLX's products copy: `text.py:stream`.
- MLX multiplies no columns of a weight by themselves, so a model of which slices are taken keeps down_proj in pieces:
  `layers.py:Slabs`, `layers.py:Slabs.__init__`, `layers.py:Slabs.arrays`, `layers.py:SlabLinear`,
  `layers.py:SlabLinear.__init__`, `layers.py:SlabLinear._views`, `layers.py:SlabLinear.__call__`,
  `layers.py:SlabLinear.narrowed`. torch's int4 form is kept so too (`kernels/packed.py`).
- MLX has no resize by output size: `vision.py:interpolated`.
- torch's products with quantized weights, `kernels/`: `layers.py:gives_rows`, `layers.py:QuantizedLinear.dequantized`,
  `layers.py:QuantizedLinear.rows`.
"""
