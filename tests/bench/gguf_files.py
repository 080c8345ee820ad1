"""Writes the headers of GGUF files, as https://github.com/ggml-org/ggml/blob/master/docs/gguf.md has them."""

import struct
from pathlib import Path
from typing import Any

UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10
ALIGNMENT = 32


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, int], version: int = 3) -> Path:
    """A file whose tensors, of so many bytes each, are zeros."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += string(key) + typed(value)
    offset = 0
    for name, size in tensors.items():
        out += string(name) + struct.pack("<IQIQ", 1, size, 24, offset)  # one axis of int8
        offset += padded(size)
    path.write_bytes(out.ljust(padded(len(out)), b"\0") + bytes(offset))
    return path


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def typed(value: Any) -> bytes:
    kind, raw = plain(value)
    return struct.pack("<I", kind) + raw


def plain(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return (UINT32, struct.pack("<I", value)) if value < 2**32 else (UINT64, struct.pack("<Q", value))
    if isinstance(value, float):
        return FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return STRING, string(value)
    kinds = [plain(item) for item in value]
    return ARRAY, struct.pack("<IQ", kinds[0][0] if kinds else UINT32, len(kinds)) + b"".join(raw for _, raw in kinds)


def write_gemma3n(path: Path, architecture: str = "gemma3n") -> Path:
    """Four layers, the last two of which share keys and values."""
    metadata = {
        "general.architecture": architecture,
        "gemma3n.block_count": 4,
        "gemma3n.attention.shared_kv_layers": 2,
        "tokenizer.ggml.tokens": ["a", "bc", ""],
    }
    tensors = {"token_embd.weight": 320, "per_layer_token_embd.weight": 6400}
    for layer in range(4):
        tensors |= {f"blk.{layer}.attn_q.weight": 64, f"blk.{layer}.attn_k.weight": 32}
        tensors |= {f"blk.{layer}.attn_v.weight": 32, f"blk.{layer}.attn_k_norm.weight": 32}
    return write_gguf(path, metadata, tensors)


GEMMA3N_BYTES_PER_TOKEN = 320 + 4 * 64 + 2 * 3 * 32
