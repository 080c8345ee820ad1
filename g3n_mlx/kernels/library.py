"""The kernels' library: the structs of src/g3n.h, and its calls.

A plain shared library without Python's API, loaded by ctypes, which lets other threads run during a call. Without it,
or on a processor that it has no instructions for, `library()` is None, and a backend's own products serve.
"""

import ctypes
import os
import sys
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from g3n_mlx.failures import BadValue

FILE = Path(__file__).with_name("libg3n.dylib" if sys.platform == "darwin" else "libg3n.so")

# Chooses the instructions: plain, avx2, avx512, avx512bf16, neon, or off for no kernels at all.
VARIABLE = "G3N_CPU"

MAX_ROWS = 16  # of one call; the rest as in src/g3n.h
MAX_INPUTS = 8


class Matrix(ctypes.Structure):
    """A weight as the checkpoint stores it."""

    _fields_ = [
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("biases", c_void_p),
        ("code_stride", c_int64),
        ("scale_stride", c_int64),
        ("rows", c_int32),
        ("columns", c_int32),
        ("bits", c_int32),
        ("group", c_int32),
        ("scale_bits", c_int32),
    ]


class Units(ctypes.Structure):
    """down_proj unit by unit."""

    _fields_ = [("codes", c_void_p), ("scales", c_void_p), ("biases", c_void_p)]


MATRICES = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "linear_left", "linear_right", "gate_proj", "up_proj", "down_proj"),
    *("modality_router", "prediction_coefs", "correction_coefs", "per_layer_input_gate", "per_layer_projection"),
)
VECTORS = (
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    *("post_laurel_norm", "router_norm", "post_per_layer_input_norm", "q_norm", "k_norm", "correct_output_scale"),
)


class Layer(ctypes.Structure):
    """A decoder layer."""

    _fields_ = [
        *((name, Matrix) for name in MATRICES),
        *((name, c_void_p) for name in VECTORS),
        ("units", Units),
        ("cutoff", c_float),
        ("sparse", c_int32),
        ("window", c_int32),
        ("rope", c_int32),
    ]


SIZES = ("hidden", "layers", "inputs", "active", "heads", "kv_heads", "head_dim", "per_layer", "widest", "rounded")


class Model(ctypes.Structure):
    """What all layers share, and both ends."""

    _fields_ = [
        ("altup_projections", Matrix * (MAX_INPUTS - 1)),
        ("altup_unembed_projections", Matrix * (MAX_INPUTS - 1)),
        ("per_layer_model_projection", Matrix),
        ("head", Matrix),
        ("per_layer_projection_norm", c_void_p),
        ("norm", c_void_p),
        ("inverse_frequencies", c_void_p * 2),
        *((name, c_int32) for name in SIZES),
        ("eps", c_float),
        ("softcap", c_float),
    ]


class Sequence(ctypes.Structure):
    """Keys and values of one sequence in one layer, and the rows that read them."""

    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_head_stride", c_int64),
        ("value_head_stride", c_int64),
        ("length", c_int32),
        ("rows", c_int32),
        ("first", c_int32),
    ]


CALLS: dict[str, tuple[object, list[object]]] = {
    "g3n_instructions": (c_char_p, []),
    "g3n_use": (c_int, [c_char_p]),
    "g3n_threads": (None, [c_int]),
    "g3n_share": (None, [c_void_p, c_void_p, c_void_p]),
    "g3n_product": (None, [POINTER(Matrix), c_void_p, c_int, c_int, c_void_p]),
    "g3n_int8_bits": (c_int, []),
    "g3n_int8_product": (None, [POINTER(Matrix), c_void_p, c_int, c_int64, c_void_p]),
    "g3n_dequantize": (None, [POINTER(Matrix), c_int64, c_int64, c_int, c_void_p]),
    "g3n_embed": (None, [POINTER(Matrix), c_void_p, c_int, c_void_p]),
    "g3n_units": (None, [POINTER(Matrix), c_void_p, c_void_p, c_void_p]),
    "g3n_norm": (None, [c_void_p, c_void_p, c_int, c_int64, c_int64, c_float, c_void_p]),
    "g3n_gate": (None, [c_void_p, c_void_p, c_int, c_int64, c_int64, c_int, c_float]),
    "g3n_attends": (c_int, []),
    "g3n_attend": (None, [POINTER(Sequence), c_void_p, c_int, c_int, c_int, c_int, c_void_p]),
    "g3n_step_new": (c_void_p, [POINTER(Model)]),
    "g3n_step_free": (None, [c_void_p]),
    "g3n_step_streams": (c_void_p, [c_void_p]),
    "g3n_step_keys": (c_void_p, [c_void_p]),
    "g3n_step_values": (c_void_p, [c_void_p]),
    "g3n_start": (None, [c_void_p, c_void_p, c_void_p, c_void_p, c_int]),
    "g3n_queries": (None, [c_void_p, POINTER(Layer)]),
    "g3n_layer": (None, [c_void_p, POINTER(Layer), c_int, POINTER(Sequence), c_int]),
    "g3n_keep": (None, [c_void_p, c_void_p, c_int]),
    "g3n_logits": (None, [c_void_p, c_void_p]),
}


@cache
def library() -> ctypes.CDLL | None:
    """The library with its instructions chosen; None where it was not built, or serves no processor like this one.

    Raises ValueError for instructions asked for by the environment that this processor or build does not have.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        return None
    if not FILE.exists():
        if wanted:
            raise BadValue(
                f"{VARIABLE}={wanted}: the kernels are not built; install g3n_mlx where there is a C compiler"
            )
        return None
    calls = ctypes.CDLL(str(FILE))
    for name, (result, arguments) in CALLS.items():
        call = getattr(calls, name)
        call.restype, call.argtypes = result, arguments
    if wanted and not calls.g3n_use(wanted.encode()):
        raise BadValue(f"{VARIABLE}={wanted}: this processor or build has no such instructions; unset it")
    return calls if wanted or calls.g3n_instructions() else None


def instructions() -> str | None:
    """The name of the instructions that the kernels run with; None without kernels."""
    calls = library()
    return None if calls is None else calls.g3n_instructions().decode()
