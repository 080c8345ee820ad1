"""What a decode step reads of a GGUF file."""

import re

from g3n_mlx.checkpoint.gguf import Header


def bytes_per_token(header: Header) -> int:
    """Stored bytes of the Gemma 3n weights that one decode step reads.

    Not the PLE table, of which it is a row, nor the keys' and values' projections of KV-sharing layers.
    """
    shared = header.metadata.get("gemma3n.attention.shared_kv_layers", 0)
    first_shared = header.metadata.get("gemma3n.block_count", 0) - shared

    def reads(name: str) -> bool:
        layer = re.match(r"blk\.(\d+)\.attn_[kv](_norm)?\.", name)
        return name != "per_layer_token_embd.weight" and (layer is None or int(layer[1]) < first_shared)

    return sum(tensor.room for name, tensor in header.tensors.items() if reads(name))
