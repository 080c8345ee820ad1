"""The project's own torch modules as a trainable network: packed rows of sequences in, logits out.

The modules are those that inference uses; this file holds what training needs beside them: the tables that inference
leaves on disk as parameters, several sequences in a row of the batch, narrower feed-forward blocks and skipped layers
(the MatFormer objective), and weights rounded to 4 bit with a straight-through gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3n_mlx.backends.torch.audio import AudioTower
from g3n_mlx.backends.torch.model import MultimodalEmbedder
from g3n_mlx.backends.torch.text import DecoderLayer, LanguageModel, Rope
from g3n_mlx.backends.torch.vision import VisionTower
from g3n_mlx.backends.torch.weights import Placement, Weights
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.recipe import is_quantized_module
from g3n_mlx.config.text import SLIDING

GROUP = 64


@dataclass(frozen=True, slots=True)
class Rows:
    """R rows of S places, several sequences behind each other in each."""

    ids: Tensor  # [R, S]
    sequences: Tensor  # [R, S], which sequence of the row a place belongs to; padding is a sequence of its own
    targets: Tensor  # [R, S], the id that should follow; -1 where nobody asks
    pictures: Tensor | None = None  # [n, 3, h, w]
    clips: Tensor | None = None  # [n, T, mel]
    clip_mask: Tensor | None = None  # [n, T], True where there is sound

    def to(self, device: torch.device) -> "Rows":
        """The same on a device."""
        arrays = (getattr(self, field.name) for field in fields(self))
        return Rows(*(array if array is None else array.to(device) for array in arrays))


class Network(nn.Module):
    """A checkpoint in float32, all of it trainable."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        super().__init__()
        self.device = torch.device(device)
        checkpoint = Checkpoint.open(folder)
        config = checkpoint.config
        assert config.vision is not None
        assert config.audio is not None
        self.config = config
        weights = Weights(checkpoint, Placement(torch.float32, self.device))
        self.language_model = LanguageModel(config.text, weights.at("language_model"))
        self.vision_tower = VisionTower(config.vision, weights.at("vision_tower"))
        self.audio_tower = AudioTower(config.audio, weights.at("audio_tower"))
        self.embed_vision = MultimodalEmbedder(config.vision, weights.at("embed_vision"))
        self.embed_audio = MultimodalEmbedder(config.audio, weights.at("embed_audio"))
        # What inference reads row by row from the file.
        self.tables = nn.ParameterDict(
            {
                name: nn.Parameter(weights.at(path).tensor())
                for name, path in {
                    "per_layer": "language_model.embed_tokens_per_layer",
                    "vision": "embed_vision.embedding",
                    "audio": "embed_audio.embedding",
                }.items()
            }
        )
        for parameter in self.parameters():  # those of inference may be views of the file, which nobody may write to
            parameter.data = parameter.data.clone()
        self.requires_grad_(True)
        checkpoint.close()

    def forward(self, rows: Rows, kept_layers: Sequence[int]) -> Tensor:
        """Logits [n, V] at the places that have a target, in order."""
        embeddings = self.embedded(rows)
        hidden = self.hidden(embeddings, rows, kept_layers)
        return self.language_model.logits(hidden[rows.targets.flatten() >= 0])

    def embedded(self, rows: Rows) -> Tensor:
        """[R * S, D]: text, the ends of media blocks, and soft tokens."""
        ids = rows.ids.flatten()
        text, vision, audio = self.config.text, self.config.vision, self.config.audio
        assert vision is not None
        assert audio is not None
        places = torch.arange(len(ids), device=ids.device)
        out = self.language_model.embed(ids.clamp(max=text.vocab_size - 1))
        for config, embedder, table in (
            (vision, self.embed_vision, self.tables["vision"]),
            (audio, self.embed_audio, self.tables["audio"]),
        ):
            end = ids == config.vocab_offset
            hard = embedder.projected(embedder.hard_embedding_norm(table[:1]))
            out = torch.where(end[:, None], hard, out)
        if rows.pictures is not None:
            soft = self.pictured(rows.pictures).flatten(0, 1)
            out = out.index_put((places[ids == vision.vocab_offset + 1],), soft)
        if rows.clips is not None and rows.clip_mask is not None:
            soft = self.heard(rows.clips, rows.clip_mask).flatten(0, 1)
            out = out.index_put((places[ids == audio.vocab_offset + 1],), soft)
        return out

    def pictured(self, pictures: Tensor) -> Tensor:
        """Soft tokens [n, tokens, D] of pictures [n, 3, h, w]."""
        features = self.vision_tower(pictures).flatten(2).transpose(1, 2)  # [n, tokens, 2048]
        return self.embed_vision.soft(features * math.sqrt(features.shape[-1]))

    def heard(self, clips: Tensor, mask: Tensor) -> Tensor:
        """Soft tokens [n, tokens, D] of clips [n, T, mel], filled up as in use."""
        assert self.config.audio is not None
        encodings, valid = self.audio_tower(clips, mask)
        soft = self.embed_audio.soft(encodings)
        filler = self.embed_audio.projected(self.embed_audio.hard_embedding_norm(self.tables["audio"][-1:]))
        soft = torch.where(valid[..., None], soft, filler)
        missing = self.config.audio.soft_tokens - soft.shape[1]
        return torch.cat([soft, filler.expand(len(soft), missing, -1)], dim=1)

    def hidden(self, embeddings: Tensor, rows: Rows, kept_layers: Sequence[int]) -> Tensor:
        """Final hidden states [R * S, D]; of the layers, only the kept ones run."""
        model, text = self.language_model, self.config.text
        num_rows, length = rows.ids.shape
        rope: Rope = {kind: (cos.repeat(num_rows, 1, 1), sin.repeat(num_rows, 1, 1))
                      for kind, (cos, sin) in model.rope(np.arange(length, dtype=np.int32)).items()}  # fmt: skip
        masks = seen(rows.sequences, text.sliding_window)
        streams, projected = model.expanded(embeddings), model.projected(embeddings)
        ids = rows.ids.flatten()
        table = self.tables["per_layer"] * model.per_layer_scale
        per_layer = F.embedding(torch.where(ids < len(table), ids, 0), table).view(projected.shape)
        per_layer = (projected + per_layer) * (1 / math.sqrt(2))
        shared: dict[int, tuple[Tensor, Tensor]] = {}
        for layer_idx in kept_layers:
            layer = model.layers[layer_idx]
            streams = self.layer(layer, streams, per_layer[:, layer_idx], rope, masks, shared, num_rows)
        return model.norm(model.merged(streams))

    def layer(
        self,
        layer: DecoderLayer,
        streams: Tensor,
        per_layer_input: Tensor,
        rope: Rope,
        masks: dict[str, Tensor],
        shared: dict[int, tuple[Tensor, Tensor]],
        num_rows: int,
    ) -> Tensor:
        """DecoderLayer's forward, with attention over rows that each hold several sequences."""
        attention = layer.self_attn
        predictions = layer.altup.predict(streams)
        active = predictions[:, layer.active_idx]
        x = layer.input_layernorm(active)
        if attention.owner_idx == attention.layer_idx:
            keys, values = attention.keys_values(x, rope)
            shared[attention.layer_idx] = by_row(keys, num_rows), by_row(values, num_rows)
        keys, values = shared[attention.owner_idx]
        queries = by_row(attention.queries(x, rope), num_rows)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, masks[attention.kind], scale=1.0, enable_gqa=True
        )  # [R, N, S, H]
        attended = attention.o_proj(attended.transpose(1, 2).reshape(len(x), -1))
        x = (active + layer.post_attention_layernorm(attended) + layer.laurel(x)) * (1 / math.sqrt(2))
        activated = x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
        return layer.updated(layer.altup.correct(predictions, activated), per_layer_input)


def by_row(x: Tensor, num_rows: int) -> Tensor:
    """[R * S, N, H] -> [R, N, S, H]."""
    return x.unflatten(0, (num_rows, -1)).transpose(1, 2)


def seen(sequences: Tensor, window: int) -> dict[str, Tensor]:
    """Masks [R, 1, S, S] of what a place sees: its own sequence up to itself, within the window where it slides."""
    length = sequences.shape[1]
    places = torch.arange(length, device=sequences.device)
    distance = places[:, None] - places
    full = (sequences[:, :, None] == sequences[:, None]) & (distance >= 0)
    return {SLIDING: (full & (distance < window))[:, None], "full_attention": full[:, None]}


def prepared(network: Network, width: int, rounded: bool) -> dict[str, Tensor]:
    """The network's weights for one pass: feed-forward blocks cut to their first units, perhaps rounded to 4 bit."""
    weights: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        weight = parameter
        if name.endswith((".gate_proj.weight", ".up_proj.weight")):
            weight = weight[:width]
        elif name.endswith(".down_proj.weight"):
            weight = weight[:, :width]
        if rounded and is_quantized_module(name.removesuffix(".weight")):
            weight = straight_through(weight)
        if weight is not parameter:
            weights[name] = weight
    return weights


def straight_through(weight: Tensor) -> Tensor:
    """The weight as 4-bit codes in groups of 64 would give it back, with the gradient of the weight itself."""
    with torch.no_grad():
        groups = weight.unflatten(-1, (-1, GROUP))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-7)
        rounded = ((groups - low) / scale).round() * scale + low
        error = rounded.flatten(-2) - weight
    return weight + error
