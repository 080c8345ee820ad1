"""The towers of Gemma 3n in a GGUF file of their own, which llama.cpp calls mmproj.

Names and shapes are the published ones, translated: axes of length 1 come and go. The file says nothing of what a
config has beyond the shapes, so that only the published towers are read: those of E2B and E4B are alike.
Source: https://github.com/ggml-org/llama.cpp, conversion/gemma.py, `Gemma3nVisionAudioModel`, and
gguf-py/gguf/tensor_mapping.py.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from g3n_mlx.checkpoint.gguf import Header, read_header
from g3n_mlx.config.audio import audio_manifest
from g3n_mlx.config.fields import read_json
from g3n_mlx.config.manifest import embedder_manifest
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.config.vision import vision_manifest
from g3n_mlx.convert.gguf.blocks import DENSE
from g3n_mlx.convert.gguf.file import GgufFile
from g3n_mlx.convert.gguf.weights import Weight
from g3n_mlx.failures import BadValue
from g3n_mlx.matformer.table import PUBLISHED

logger = logging.getLogger(__name__)

_PROJECTORS = {"gemma3nv", "gemma3na"}
_EMBEDDER = {
    "embedding": "embedding",
    "hard_embedding_norm": "hard_emb_norm",
    "soft_embedding_norm": "soft_emb_norm",
    "embedding_projection": "input_projection",
}
_CONFORMER = {
    "attention.pre_attn_norm": "ln1",
    "attention.attn.per_dim_scale": "per_dim_scale",
    "attention.attn.relative_position_embedding.pos_proj": "linear_pos",
    "attention.attn.q_proj": "attn_q",
    "attention.attn.k_proj": "attn_k",
    "attention.attn.v_proj": "attn_v",
    "attention.post": "attn_out",
    "attention.post_norm": "ln2",
    "lconv1d.pre_layer_norm": "conv_norm",
    "lconv1d.linear_start": "conv_pw1",
    "lconv1d.depthwise_conv1d": "conv_dw",
    "lconv1d.conv_norm": "norm_conv",
    "lconv1d.linear_end": "conv_pw2",
    "norm": "layer_pre_norm",
    "ffw_layer_start.pre_layer_norm": "ffn_norm",
    "ffw_layer_start.ffw_layer_1": "ffn_up",
    "ffw_layer_start.ffw_layer_2": "ffn_down",
    "ffw_layer_start.post_layer_norm": "ffn_post_norm",
    "ffw_layer_end.pre_layer_norm": "ffn_norm_1",
    "ffw_layer_end.ffw_layer_1": "ffn_up_1",
    "ffw_layer_end.ffw_layer_2": "ffn_down_1",
    "ffw_layer_end.post_layer_norm": "ffn_post_norm_1",
}
_SUBSAMPLING = re.compile(r"conv_(\d+)\.(conv|norm)\.weight")


def check_towers(path: Path, header: Header) -> None:
    """Raises ValueError unless the file holds towers of Gemma 3n."""
    kind = header.metadata.get("general.architecture")
    if kind != "clip":
        raise BadValue(f"{path}: the architecture is {kind!r}, expected 'clip': --mmproj takes the file of the towers")
    if not _has_towers_of_ours(header):
        raise BadValue(
            f"{path}: the towers are {_projectors(header)}, expected those of Gemma 3n, {sorted(_PROJECTORS)}"
        )


def towers_beside(path: Path) -> Path | None:
    """The one file with Gemma 3n's towers in the folder of a language model's file; None if there is none.

    Of several none is taken, which a warning says.
    """
    named = sorted(other for other in path.parent.glob("*.gguf") if "mmproj" in other.name.lower() and other != path)
    found = [other for other in named if _has_towers_of_ours(read_header(other))]
    if len(found) > 1:
        names = ", ".join(other.name for other in found)
        logger.warning(
            "%s: several files of towers lie beside it, %s: leave one there, or convert with --mmproj", path, names
        )
    return found[0] if len(found) == 1 else None


def tower_config(towers: GgufFile) -> dict[str, Any]:
    """What config.json says of the towers that a file holds; raises ValueError if it holds none."""
    config: dict[str, Any] = {}
    for kind, prefix in (("vision", "v."), ("audio", "a.")):
        if any(name.startswith(prefix) for name in towers.header.tensors):
            config |= published_towers()[kind]
    if not config:
        raise BadValue(f"{towers.path} holds no tower")
    return config


def published_towers() -> dict[str, Any]:
    """What config.json says of "vision" and "audio", and the published preprocessor_config.json."""
    return read_json(PUBLISHED.with_name("gemma3n-towers.json"))


def tower_weights(towers: GgufFile, config: ModelConfig) -> list[Weight]:
    """The towers' tensors by their published names; raises ValueError unless the file has just those.

    Quantized ones become the float32 numbers that they stand for.
    """
    width = config.text.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    if config.vision is not None:
        shapes |= vision_manifest(config.vision) | embedder_manifest("embed_vision", config.vision, width)
    if config.audio is not None:
        shapes |= audio_manifest(config.audio) | embedder_manifest("embed_audio", config.audio, width)
    names = {name: tower_name(name) for name in shapes}
    _require_the_same(towers.path, set(towers.header.tensors), names.values())
    return [_weight(towers, name, shapes[name], theirs) for name, theirs in names.items()]


def tower_name(name: str) -> str:
    """GGUF's name of a published tensor of the towers or their embedders."""
    tower, _, rest = name.partition(".")
    if tower in ("embed_vision", "embed_audio"):
        module, _, part = rest.partition(".")
        return f"mm.{'a.' if tower == 'embed_audio' else ''}{_EMBEDDER[module]}.{part}"
    if tower == "vision_tower":
        return "v." + rest.removeprefix("timm_model.").replace("blocks.", "blk.", 1)
    section, _, rest = rest.partition(".")
    if section == "subsample_conv_projection":
        found = _SUBSAMPLING.fullmatch(rest)
        if found is None:
            return "a.pre_encode.out.weight"
        return f"a.conv1d.{found[1]}.{'norm.' if found[2] == 'norm' else ''}weight"
    layer, _, rest = rest.partition(".")
    part = rest.removesuffix(".weight")
    return f"a.blk.{layer}.{_CONFORMER[part]}{rest.removeprefix(part)}"


def _weight(towers: GgufFile, name: str, shape: tuple[int, ...], theirs: str) -> Weight:
    found = towers.header.tensors[theirs]
    if _without_ones(found.shape) != _without_ones(shape) or (len(shape) == 1 and found.kind not in DENSE):
        raise BadValue(
            f"{towers.path}: {theirs} has the shape {list(found.shape)}, expected {list(shape)}: are the towers of "
            "another size than the language model, or than the published ones?"
        )
    return Weight(name, shape, found.kind, None, towers.rows(theirs, shape))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _require_the_same(path: Path, found: set[str], wanted: Iterable[str]) -> None:
    wanted = set(wanted)
    if missing := sorted(wanted - found):
        raise BadValue(f"{path} lacks {len(missing)} of the towers' tensors, such as {missing[0]}")
    if unknown := sorted(found - wanted):
        raise BadValue(f"{path} has a tensor {unknown[0]!r:.80}, which Gemma 3n's towers have not")


def _has_towers_of_ours(header: Header) -> bool:
    return bool(found := _projectors(header)) and set(found) <= _PROJECTORS


def _projectors(header: Header) -> list[str]:
    keys = ("clip.projector_type", "clip.vision.projector_type", "clip.audio.projector_type")
    return [str(header.metadata[key]) for key in keys if key in header.metadata]
