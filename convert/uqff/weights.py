"""How the weights of every format are written: affine, or dense in towers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from g3n_mlx.checkpoint.names import TOWERS
from g3n_mlx.checkpoint.quantization import Quantization, dequantize, pack, quantize
from g3n_mlx.checkpoint.shards import DTYPES, StoredTensor
from g3n_mlx.convert.gguf.blocks import AFFINE, Affine, Parts
from g3n_mlx.convert.quantize import Output, TensorJob, quantized_outputs
from g3n_mlx.convert.uqff.files import Module, read
from g3n_mlx.convert.uqff.hqq import hqq_parts
from g3n_mlx.failures import BadValue

_FORMATS = {0: "GGUF", 1: "unquantized", 2: "HQQ", 3: "FP8", 4: "AFQ", 5: "F8Q8", 6: "MXFP4"}
_Q6K = 14  # ggml's number


def copied(name: str, stored: StoredTensor) -> TensorJob:
    rows = stored.shape[0] if stored.shape else 1
    produce: Callable[[int, int], tuple[np.ndarray, ...]] = lambda start, stop: (read(stored, start, stop),)  # noqa: E731
    return TensorJob((Output(name, stored.dtype, stored.shape),), rows, stored.num_bytes, produce)


def converted(path: str, module: Module) -> tuple[TensorJob, Quantization | None]:
    """What is written for a module, and how it is stored then; None is dense."""
    if "" not in module.parts:
        raise BadValue(f"{module.where} is not there, but what belongs to it: download the file again")
    in_tower = path.startswith(tuple(TOWERS.values()))
    if module.format == 1:
        return copied(f"model.{path}.weight", module.parts[""]), None
    if module.format == 4:
        return _afq(path, module, in_tower)
    if module.format == 0:
        return _blocks(path, module, in_tower)
    if module.format == 2:
        return _hqq(path, module, in_tower)
    name = _FORMATS.get(module.format, f"format {module.format}")
    raise BadValue(
        f"{module.where} is stored as {name}, which is not read: AFQ, Q4_0 to Q8_0, Q4K, Q5K, Q6K, HQQ4, "
        "HQQ8 and unquantized tensors are; quantize the original checkpoint to one of these"
    )


def _afq(path: str, module: Module, in_tower: bool) -> tuple[TensorJob, Quantization | None]:
    how = Quantization(module.number("bits"), module.number("group_size"))
    parts = [module.part(part) for part in ("", "scales", "biases")]
    shape = (parts[0].shape[0], parts[0].shape[1] * 32 // how.bits)
    size = sum(part.num_bytes for part in parts)
    if in_tower:
        dense = Output(f"model.{path}.weight", parts[1].dtype, shape)
        dtype = DTYPES[dense.dtype]

        def unpacked(start: int, stop: int) -> tuple[np.ndarray, ...]:
            packed, scales, biases = (read(part, start, stop) for part in parts)
            return (dequantize(packed, scales, biases, how.bits, how.group_size).astype(dtype),)

        return TensorJob((dense,), shape[0], size, unpacked), None
    outputs = quantized_outputs(f"model.{path}", shape, how, parts[1].dtype)

    def copied(start: int, stop: int) -> tuple[np.ndarray, ...]:
        return tuple(read(part, start, stop) for part in parts)

    return TensorJob(outputs, shape[0], size, copied), how


def _blocks(path: str, module: Module, in_tower: bool) -> tuple[TensorJob, Quantization | None]:
    """llama.cpp's blocks, which lie row after row."""
    kind = module.number("dtype")
    if kind not in _KINDS:
        raise BadValue(
            f"{module.where} is stored as ggml type {kind}, which is not read: quantize the original checkpoint to "
            f"{', '.join(entry.name for entry in _KINDS.values())} or AFQ"
        )
    layout = _KINDS[kind]
    rows, width = module.shape()
    stored, row_bytes = module.parts[""], width // layout.block_size * layout.block_bytes
    if width % layout.block_size or stored.num_bytes != rows * row_bytes:
        raise BadValue(f"{module.where} has {stored.num_bytes} bytes, expected {layout.name} of {[rows, width]}")
    flat = StoredTensor(stored.shard, stored.offset, "U8", (rows, row_bytes))

    def parts(start: int, stop: int) -> Parts:
        return layout.parts(read(flat, start, stop))

    return _affine(path, module, parts, None if in_tower else Quantization(layout.bits, 32))


def _hqq(path: str, module: Module, in_tower: bool) -> tuple[TensorJob, Quantization | None]:
    parts, (_, width) = hqq_parts(module), module.shape()
    if rounded_anew(module) is None:
        how = Quantization(module.number("bits"), module.number("group_size"))
    else:
        how = Quantization(8, 32) if width % 32 == 0 else None
    return _affine(path, module, parts, None if in_tower else how)


def rounded_anew(module: Module) -> str | None:
    """The name of a module's format where its weights don't keep their numbers, but go to 8 bits."""
    if module.format == 0 and module.number("dtype") == _Q6K:
        return _KINDS[_Q6K].name
    if module.format == 2 and module.number("axis") == 0:
        return f"HQQ{module.number('bits')}"
    return None


def _affine(
    path: str, module: Module, parts: Callable[[int, int], Parts], how: Quantization | None
) -> tuple[TensorJob, Quantization | None]:
    """What is written for weights of any affine groups; how: the layout to write them in, None is dense."""
    rows, width = module.shape()
    outputs: tuple[Output, ...] = (Output(f"model.{path}.weight", "BF16", (rows, width)),)
    if how is not None:
        outputs = quantized_outputs(f"model.{path}", (rows, width), how, "F32")
    return TensorJob(outputs, rows, module.parts[""].num_bytes, partial(_stored, parts, how)), how


def _stored(
    parts: Callable[[int, int], Parts], how: Quantization | None, start: int, stop: int
) -> tuple[np.ndarray, ...]:
    codes, scales, biases = parts(start, stop)
    per_group = codes.shape[-1] // scales.shape[-1]
    if how is not None and per_group == how.group_size:
        return pack(codes, how.bits), scales, biases
    values = codes.reshape(*scales.shape, per_group) * scales[..., None] + biases[..., None]
    values = values.reshape(codes.shape).astype(np.float32)
    return (values.astype(DTYPES["BF16"]),) if how is None else quantize(values, how.bits, how.group_size)


def _q6_k(blocks: np.ndarray) -> Parts:
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], axis=2)  # [n, 2, 4, 32]
    codes = low | (high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3) << 4
    scale = np.ascontiguousarray(blocks[:, 208:210]).view("<f2").astype(np.float32)
    scales = scale * blocks[:, 192:208].view(np.int8)  # of groups of 16
    return codes, scales, -32 * scales


# Q6K too: affine in groups of 16, so that it is stored at 8 bits.
_KINDS = {kind: replace(entry, name=entry.name.replace("_K", "K")) for kind, entry in AFFINE.items()}
_KINDS[_Q6K] = Affine("Q6K", 8, 210, 256, _q6_k)
