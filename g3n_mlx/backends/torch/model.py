"""The top-level module, and what the core calls (g3n_mlx/interface.py).

Ids of the image and audio ranges are embedded by their modality's embedder wherever they occur, in a prompt or
decoded; its weights are read when the first such id is met, a tower's at the first image or clip. Text-only
checkpoints have neither: there these ids are rows of the token embeddings, as in transformers' Gemma3nForCausalLM.
Source: transformers, modeling_gemma3n.py, `Gemma3nModel`.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from g3n_mlx.backends.torch import kv_arrays
from g3n_mlx.backends.torch.audio import AudioTower
from g3n_mlx.backends.torch.kernels.fused import fused_model
from g3n_mlx.backends.torch.layers import Recorder, linear
from g3n_mlx.backends.torch.sampling import Sampler, Step
from g3n_mlx.backends.torch.steps import DecodeSteps
from g3n_mlx.backends.torch.text import LanguageModel, RMSNorm
from g3n_mlx.backends.torch.vision import VisionTower
from g3n_mlx.backends.torch.weights import Placement, Weights, from_numpy
from g3n_mlx.checkpoint.folder import Changes, Checkpoint
from g3n_mlx.config.audio import AudioConfig
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.config.vision import VisionConfig
from g3n_mlx.interface import MEDIA_TOGETHER, KVArrays
from g3n_mlx.kernels.library import instructions
from g3n_mlx.matformer.loaded import LoadedLayers, module_at, put_module
from g3n_mlx.matformer.plan import SlicePlan, whole_plan
from g3n_mlx.rows import Batch, Cache, Soft, embedder_rows
from g3n_mlx.sampling import SamplingParams

logger = logging.getLogger(__name__)


class MultimodalEmbedder(nn.Module):
    """One modality's way into the text model: norm, projection, norm without weight; not scaled."""

    def __init__(self, config: VisionConfig | AudioConfig, weights: Weights) -> None:
        super().__init__()
        self.vocab_offset = config.vocab_offset
        self.dtype, self.device = weights.dtype, weights.device
        self.embedding = weights.at("embedding").rows()
        self.hard_embedding_norm = RMSNorm(weights.at("hard_embedding_norm"), config.rms_norm_eps)
        self.soft_embedding_norm = RMSNorm(weights.at("soft_embedding_norm"), config.rms_norm_eps)
        self.embedding_projection = linear(weights.at("embedding_projection"))
        self.embedding_post_projection_norm = RMSNorm(None, config.rms_norm_eps)

    def forward(self, token_ids: np.ndarray) -> Tensor:
        """[T] ids of the modality's range -> [T, D]."""
        embedded = from_numpy(self.embedding.gather(token_ids - self.vocab_offset)).to(self.device, self.dtype)
        return self.projected(self.hard_embedding_norm(embedded))

    def soft(self, encodings: Tensor) -> Tensor:
        """What a tower made of an image or a clip, [n, hidden] -> soft tokens [n, D]."""
        return self.projected(self.soft_embedding_norm(encodings.to(self.dtype)))

    def projected(self, normed: Tensor) -> Tensor:
        """[n, hidden] -> [n, D]."""
        return self.embedding_post_projection_norm(self.embedding_projection(normed))


class Towers:
    """The vision and the audio tower with their embedders, read at their first use.

    A model shares them with its slices. They keep the files open for themselves, whichever of these is closed first.
    """

    def __init__(self, weights: Weights) -> None:
        self.config: ModelConfig = weights.checkpoint.config
        self.weights = weights
        self.embedders: dict[str, MultimodalEmbedder] = {}
        self.vision_tower: VisionTower | None = None
        self.audio_tower: AudioTower | None = None

    def embed_images(self, pixels: np.ndarray) -> list[Tensor]:
        """Images [B, h, w, 3] as soft tokens [n, D] each."""
        config = self.config.vision
        assert config is not None
        if self.vision_tower is None:
            self.vision_tower = VisionTower(config, self.weights.at("vision_tower"))
        images = torch.from_numpy(pixels).to(self.weights.device, self.weights.dtype).permute(0, 3, 1, 2)
        features = self.vision_tower(images)  # [B, C, h', w'] of [B, 3, h, w]
        rows = features.flatten(2).transpose(1, 2) * config.hidden_size**0.5  # [B, h' * w', C], row by row of the image
        return list(self.embedder("embed_vision").soft(rows.flatten(0, 1)).unflatten(0, rows.shape[:2]))

    def embed_audio(self, frames: np.ndarray, mask: np.ndarray) -> list[Tensor]:
        """Clips' log-mel frames [B, T, mel], of which the mask says which are real, as soft tokens [n, D] each.

        Padded positions and what the clip leaves over of the n are the embedding of the audio range's last id.
        """
        config, device = self.config.audio, self.weights.device
        assert config is not None
        if self.audio_tower is None:
            self.audio_tower = AudioTower(config, self.weights.at("audio_tower"))
        mel = torch.from_numpy(frames).to(device, self.weights.dtype)
        encodings, valid = self.audio_tower(mel, torch.from_numpy(mask).to(device))  # [B, T', hidden], [B, T']
        embedder = self.embedder("embed_audio")
        filler = embedder(np.array([config.vocab_offset + config.vocab_size - 1]))  # [1, D]
        soft = embedder.soft(encodings.flatten(0, 1)).unflatten(0, valid.shape)
        rest = filler.expand(config.soft_tokens - soft.shape[1], -1)
        return [torch.cat([rows, rest]) for rows in torch.where(valid[..., None], soft, filler)]

    def embedder(self, name: str) -> MultimodalEmbedder:
        """An embedder, read at its first use."""
        if name not in self.embedders:
            config = self.config.vision if name == "embed_vision" else self.config.audio
            assert config is not None
            self.embedders[name] = MultimodalEmbedder(config, self.weights.at(name))
        return self.embedders[name]

    def drop(self) -> None:
        """Frees both towers; the next image or clip reads them again."""
        self.vision_tower = None
        self.audio_tower = None
        self.weights.checkpoint.release_pages()


class Gemma3nModel(nn.Module):
    """A loaded checkpoint on one device, or a slice of one."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        loaded: LoadedLayers | None = None,
    ) -> None:
        """loaded: for a slice or a model with an adapter, the layers that it shares with the model that is there."""
        super().__init__()
        self.config: ModelConfig = checkpoint.config
        self.device = device
        self.weights = Weights(checkpoint, Placement(dtype, device))
        weights = self.weights if loaded is None else self.weights.sharing(loaded.at, loaded.changes)
        self.language_model = LanguageModel(self.config.text, weights.at("language_model"))
        self.decode_steps = DecodeSteps(self.language_model, self.config)
        self.fused = fused_model(self.language_model)
        path = "PyTorch's operations" if self.fused is None else f"the kernels in C ({instructions()})"
        logger.info("decode steps on %s run through %s", device, path)
        self.is_sliceable = loaded is not None and loaded.changes is None
        if loaded is None or (loaded.changes is not None and loaded.changes.reaches_towers):
            self.towers: Towers = Towers(self.weights.reopened())
        else:
            self.towers = loaded.model.towers

    def slice(self, checkpoint: Checkpoint, plan: SlicePlan) -> "Gemma3nModel":
        """The slice that a plan for this model takes from it, in the same memory; each is closed by itself.

        checkpoint: this model's, viewed through the plan.
        """
        if not self.is_sliceable:
            self.is_sliceable = True
            for layer in self.language_model.layers:
                layer.mlp.make_sliceable()
        loaded = LoadedLayers(self, self.config.text, plan)
        return Gemma3nModel(checkpoint, self.weights.dtype, self.device, loaded)

    def adapted(self, checkpoint: Checkpoint, changes: Changes) -> "Gemma3nModel":
        """The same model with an adapter, over the same weights; each is closed by itself.

        checkpoint: this model's with the changes, those of dense weights beside them.
        """
        loaded = LoadedLayers(self, self.config.text, whole_plan(self.config.text), changes)
        return Gemma3nModel(checkpoint, self.weights.dtype, self.device, loaded)

    @property
    def kv_arrays(self) -> KVArrays:
        """What the sequences' KV caches are made of."""
        return kv_arrays

    @torch.no_grad()
    def second_moments(
        self, batch: Batch, paths: Sequence[str], block_width: int, found: Callable[[str, list[np.ndarray]], None]
    ) -> None:
        """Runs the layers over a batch whose rows are all kept; hands over sums of x x^T of modules' inputs."""
        recorders = {path: Recorder(module_at(self, path), block_width, partial(found, path)) for path in paths}
        try:
            for path, recorder in recorders.items():
                put_module(self, path, recorder)
            start = self.language_model.start(self.embed(batch.token_ids(), batch.soft()), batch.positions)
            self.language_model(start, batch)
        finally:
            for path, recorder in recorders.items():
                put_module(self, path, recorder.layer)

    def make_sampler(self, params: SamplingParams, prompt_ids: Sequence[int]) -> Sampler:
        """A sampler for one answer."""
        return Sampler(params, prompt_ids, self.config.text.vocab_size, self.device)

    @torch.no_grad()
    def has_finite_head(self) -> bool:
        """Whether the final norm's and the head's weights are finite, seen in one product of theirs."""
        ones = torch.ones(1, self.config.text.hidden_size, dtype=self.weights.dtype, device=self.device)
        return bool(self.language_model.embed_tokens(self.language_model.norm(ones)).isfinite().all())

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor | None:
        """Appends a batch to its sequences' caches; logits [R, V] of the rows that are kept, None where R is 0."""
        if self.fused is not None and self.fused.takes(batch):
            return self.fused(self.embed(batch.token_ids(), batch.soft()), batch)
        if self.decode_steps.takes(batch):
            hidden = self.decode_steps(batch)
        else:
            start = self.language_model.start(self.embed(batch.token_ids(), batch.soft()), batch.positions)
            hidden = self.language_model(start, batch)
        return None if hidden is None else self.language_model.logits(hidden)

    @torch.no_grad()
    def begin_next(self, steps: Sequence[Step], caches: Sequence[Cache]) -> None:
        """Starts on the next decode step of these sequences, whose tokens may not be known yet."""
        self.decode_steps.begin(steps, caches)

    @property
    def media_together(self) -> int:
        """Images or clips worth encoding in a call: one on a CPU, whose cores a single one keeps busy."""
        return 1 if self.device.type == "cpu" else MEDIA_TOGETHER

    @torch.no_grad()
    def embed_images(self, pixels: np.ndarray) -> list[Tensor]:
        """Images [B, h, w, 3] as soft tokens [n, D] each."""
        return self.towers.embed_images(pixels)

    @torch.no_grad()
    def embed_audio(self, frames: np.ndarray, mask: np.ndarray) -> list[Tensor]:
        """Clips' log-mel frames [B, T, mel], of which the mask says which are real, as soft tokens [n, D] each."""
        return self.towers.embed_audio(frames, mask)

    def numpy(self, array: Tensor) -> np.ndarray:
        """Soft tokens or logits on the host, float32."""
        return array.float().cpu().numpy()

    def drop_towers(self) -> None:
        """Frees both towers; the next image or clip reads them again."""
        self.towers.drop()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Frees all weights but those that another slice shares; no call may follow."""
        if self.fused is not None:
            self.fused.close()
        del self.language_model, self.decode_steps, self.fused, self.towers, self.weights
        gc.collect()  # compiled steps and the modules that they belong to refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak_memory_bytes(self) -> int:
        """Most memory allocated on a GPU so far; 0 on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def embed(self, token_ids: np.ndarray, soft: Soft = ()) -> Tensor:
        """[T] ids -> [T, D]: text scaled, ids of the image and audio ranges through their embedder, or soft tokens."""
        embeddings = self.language_model.embed(torch.from_numpy(token_ids).to(self.device))
        for start, rows in soft:
            embeddings[start : start + len(rows)] = rows  # pyright: ignore[reportArgumentType] (ours)
        for name, rows in embedder_rows(self.config, token_ids, soft).items():
            embeddings[torch.from_numpy(rows).to(self.device)] = self.towers.embedder(name)(token_ids[rows])
        return embeddings
