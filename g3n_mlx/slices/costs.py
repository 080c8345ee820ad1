"""What candidates cost: bytes in memory as `--list-slices` counts them, or bytes that a decode step reads."""

from collections.abc import Mapping

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.quantization import Quantization
from g3n_mlx.checkpoint.recipe import can_be_quantized
from g3n_mlx.config.manifest import PLE_TABLE, TEXT, TOKEN_TABLE, dead_manifest
from g3n_mlx.convert import DEFAULT_GROUP_SIZE, DEFAULT_PLE_BITS
from g3n_mlx.matformer.sizes import PROGRAM_BYTES, SizedSlice, size_slices
from g3n_mlx.slices.space import UNCHANGED, Candidate, slice_row


class Costs:
    """The sizes of the candidates of one checkpoint, each worked out once."""

    def __init__(self, checkpoint: Checkpoint, dtype: str | None = None) -> None:
        """dtype: of what is not quantized, as safetensors spells it; None is the checkpoint's."""
        self._checkpoint = checkpoint
        self._dtype = dtype or checkpoint.info(f"{TEXT}norm.weight").dtype
        self._known: dict[Candidate, SizedSlice] = {}

    def sized(self, candidate: Candidate) -> SizedSlice:
        if candidate not in self._known:
            stored = stored_quantizations(self._checkpoint, candidate)
            raw_text, row = self._checkpoint.raw_config["text_config"], slice_row(candidate, "candidate")
            (self._known[candidate],) = size_slices(
                raw_text, [row], None, DEFAULT_GROUP_SIZE, DEFAULT_PLE_BITS, self._dtype, stored
            )
        return self._known[candidate]

    def memory(self, candidate: Candidate) -> int:
        """Bytes in memory while a text is read and answered."""
        return self.sized(candidate).resident_bytes

    def disk(self, candidate: Candidate) -> int:
        """Bytes of the text model on disk."""
        return self.sized(candidate).disk_bytes

    def read_per_token(self, candidate: Candidate) -> int:
        """Bytes of weights that one decode step reads: all that are in memory."""
        sized = self.sized(candidate)
        return sized.resident_bytes - sized.cache_bytes - PROGRAM_BYTES


def quantizations(checkpoint: Checkpoint, candidate: Candidate) -> dict[str, Quantization]:
    """How a candidate stores the checkpoint's modules, by the checkpoint's paths, skipped layers included."""
    if not has_bits(candidate):
        return dict(checkpoint.quantizations)
    return _chosen(candidate, {name: checkpoint.info(name).shape for name in checkpoint.names})


def stored_quantizations(checkpoint: Checkpoint, candidate: Candidate) -> dict[str, Quantization]:
    """The same with what no model reads and a conversion stores all the same."""
    found = quantizations(checkpoint, candidate)
    return (_chosen(candidate, dead_manifest(checkpoint.config.text)) if has_bits(candidate) else {}) | found


def _chosen(candidate: Candidate, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Quantization]:
    found: dict[str, Quantization] = {}
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        bits = bits_of(candidate, path)
        if bits and shape[-1] % DEFAULT_GROUP_SIZE == 0:
            found[path] = Quantization(bits, DEFAULT_GROUP_SIZE)
    return found


def has_bits(candidate: Candidate) -> bool:
    """Whether it stores anything otherwise than the checkpoint."""
    parts = [candidate.outside, *(layer[1:] for layer in candidate.layers)]
    return any(bits != UNCHANGED for part in parts for bits in part)


def bits_of(candidate: Candidate, path: str) -> int:
    """At how many bits a candidate stores a module of the checkpoint; UNCHANGED where it says nothing."""
    if not can_be_quantized(path):
        return UNCHANGED
    outside = candidate.outside
    if path in (TOKEN_TABLE, PLE_TABLE):
        return outside.token_bits if path == TOKEN_TABLE else outside.ple_bits
    number, _, part = path.removeprefix(f"{TEXT}layers.").partition(".")
    if not path.startswith(f"{TEXT}layers."):
        return outside.other_bits
    layer = candidate.layers[int(number)]
    if part.startswith("per_layer_"):
        return outside.gate_bits
    if part.startswith("laurel."):
        return outside.laurel_bits
    return layer.ffn_bits if part.startswith("mlp.") else layer.attention_bits
