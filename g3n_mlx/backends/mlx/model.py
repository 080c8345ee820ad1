"""The top-level module, and what the core calls (g3n_mlx/interface.py).

Ids of the image and audio ranges are embedded by their modality's embedder wherever they occur, in a prompt or
decoded; its weights are read when the first such id is met, a tower's at the first image or clip. Text-only
checkpoints have neither: there these ids are rows of the token embeddings, as in transformers' Gemma3nForCausalLM.
Source: transformers, modeling_gemma3n.py, `Gemma3nModel`.
"""

import gc
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import numpy as np
from mlx import nn

from g3n_mlx.backends.mlx import kv_arrays
from g3n_mlx.backends.mlx.audio import AudioTower
from g3n_mlx.backends.mlx.layers import Recorder, linear
from g3n_mlx.backends.mlx.sampling import Sampler, Step
from g3n_mlx.backends.mlx.steps import DecodeSteps
from g3n_mlx.backends.mlx.text import LanguageModel, RMSNorm
from g3n_mlx.backends.mlx.vision import VisionTower
from g3n_mlx.backends.mlx.weights import Placement, Weights, evaluated, from_numpy
from g3n_mlx.checkpoint.folder import Changes, Checkpoint
from g3n_mlx.config.audio import AudioConfig
from g3n_mlx.config.model import ModelConfig
from g3n_mlx.config.vision import VisionConfig
from g3n_mlx.interface import MEDIA_TOGETHER, KVArrays
from g3n_mlx.matformer.loaded import LoadedLayers, module_at, put_module
from g3n_mlx.matformer.plan import SlicePlan, whole_plan
from g3n_mlx.rows import Batch, Cache, Soft, embedder_rows
from g3n_mlx.sampling import SamplingParams


class MultimodalEmbedder(nn.Module):
    """One modality's way into the text model: norm, projection, norm without weight; not scaled."""

    def __init__(self, config: VisionConfig | AudioConfig, weights: Weights) -> None:
        super().__init__()
        self.vocab_offset = config.vocab_offset
        self._dtype = weights.dtype
        self.embedding = weights.at("embedding").rows()
        self.hard_embedding_norm = RMSNorm(weights.at("hard_embedding_norm"), config.rms_norm_eps)
        self.soft_embedding_norm = RMSNorm(weights.at("soft_embedding_norm"), config.rms_norm_eps)
        self.embedding_projection = linear(weights.at("embedding_projection"))
        self.embedding_post_projection_norm = RMSNorm(None, config.rms_norm_eps)

    def __call__(self, token_ids: np.ndarray) -> mx.array:
        """[T] ids of the modality's range -> [T, D]."""
        embedded = from_numpy(self.embedding.gather(token_ids - self.vocab_offset)).astype(self._dtype)
        return self.projected(self.hard_embedding_norm(embedded))

    def soft(self, encodings: mx.array) -> mx.array:
        """What a tower made of an image or a clip, [n, hidden] -> soft tokens [n, D]."""
        return self.projected(self.soft_embedding_norm(encodings))

    def projected(self, normed: mx.array) -> mx.array:
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

    def embed_images(self, pixels: np.ndarray) -> list[mx.array]:
        """Images [B, h, w, 3] as soft tokens [n, D] each."""
        config = self.config.vision
        assert config is not None
        if self.vision_tower is None:
            self.vision_tower = VisionTower(config, self.weights.at("vision_tower"))
        features = self.vision_tower(mx.array(pixels).astype(self.weights.dtype))  # [B, h', w', C]
        rows = features.reshape(-1, config.hidden_size) * config.hidden_size**0.5  # row by row of each image
        return list(
            evaluated(self.embedder("embed_vision").soft(rows).reshape(len(pixels), -1, self.config.text.hidden_size))
        )

    def embed_audio(self, frames: np.ndarray, mask: np.ndarray) -> list[mx.array]:
        """Clips' log-mel frames [B, T, mel], of which the mask says which are real, as soft tokens [n, D] each.

        Padded positions and what the clip leaves over of the n are the embedding of the audio range's last id.
        """
        config = self.config.audio
        assert config is not None
        if self.audio_tower is None:
            self.audio_tower = AudioTower(config, self.weights.at("audio_tower"))
        mel = mx.array(frames).astype(self.weights.dtype)
        encodings, valid = self.audio_tower(mel, mx.array(mask))  # [B, T', hidden], [B, T']
        embedder = self.embedder("embed_audio")
        filler = embedder(np.array([config.vocab_offset + config.vocab_size - 1]))  # [1, D]
        soft = embedder.soft(encodings.flatten(0, 1)).reshape(*valid.shape, -1)
        rest = mx.broadcast_to(filler, (len(frames), config.soft_tokens - soft.shape[1], filler.shape[1]))
        return list(evaluated(mx.concatenate([mx.where(valid[..., None], soft, filler), rest], axis=1)))

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


class Gemma3nModel(nn.Module):
    """A loaded checkpoint on one device, or a slice of one."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: mx.Dtype,
        device: mx.Device,
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
        # Of the chunk of a prompt that is being computed: numbers of its own, which keep no keys and values alive.
        self._chunk: list[mx.array] | None = None
        self.is_sliceable = loaded is not None and loaded.changes is None
        if loaded is None or (loaded.changes is not None and loaded.changes.reaches_towers):
            self.towers: Towers = Towers(self.weights.reopened())
        else:
            self.towers = loaded.model.towers

    def slice(self, checkpoint: Checkpoint, plan: SlicePlan) -> "Gemma3nModel":
        """The slice that a plan for this model takes from it, in the same memory; each is closed by itself.

        checkpoint: this model's, viewed through the plan.
        """
        mx.set_default_device(self.device)
        if not self.is_sliceable:
            self.is_sliceable = True
            for layer in self.language_model.layers:
                layer.mlp.make_sliceable()
            self.decode_steps.compile()  # the steps hold what was there
        loaded = LoadedLayers(self, self.config.text, plan)
        model = Gemma3nModel(checkpoint, self.weights.dtype, self.device, loaded)
        mx.eval(model.language_model.parameters())  # all views at once
        return model

    def adapted(self, checkpoint: Checkpoint, changes: Changes) -> "Gemma3nModel":
        """The same model with an adapter, over the same weights; each is closed by itself.

        checkpoint: this model's with the changes, those of dense weights beside them.
        """
        mx.set_default_device(self.device)
        loaded = LoadedLayers(self, self.config.text, whole_plan(self.config.text), changes)
        model = Gemma3nModel(checkpoint, self.weights.dtype, self.device, loaded)
        mx.eval(model.language_model.parameters())
        return model

    @property
    def kv_arrays(self) -> KVArrays:
        """What the sequences' KV caches are made of."""
        return kv_arrays

    def second_moments(
        self, batch: Batch, paths: Sequence[str], block_width: int, found: Callable[[str, list[np.ndarray]], None]
    ) -> None:
        """Runs the layers over a batch whose rows are all kept; hands over sums of x x^T of modules' inputs."""
        mx.set_default_device(self.device)
        recorders = {path: Recorder(module_at(self, path), block_width, partial(found, path)) for path in paths}
        try:
            for path, recorder in recorders.items():
                put_module(self, path, recorder)
            start = self.language_model.start(self.embed(batch.token_ids(), batch.soft()), batch.positions)
            mx.eval(self.language_model(start, batch))
        finally:
            for path, recorder in recorders.items():
                put_module(self, path, recorder.layer)

    def make_sampler(self, params: SamplingParams, prompt_ids: Sequence[int]) -> Sampler:
        """A sampler for one answer."""
        return Sampler(params, prompt_ids, self.config.text.vocab_size, self.device)

    def has_finite_head(self) -> bool:
        """Whether the final norm's and the head's weights are finite, seen in one product of theirs."""
        ones = mx.ones((1, self.config.text.hidden_size), dtype=self.weights.dtype)
        return bool(mx.isfinite(self.language_model.embed_tokens(self.language_model.norm(ones))).all().item())

    def __call__(self, batch: Batch) -> mx.array | None:
        """Appends a batch to its sequences' caches; logits [R, V] of the rows that are kept, None where R is 0."""
        mx.set_default_device(self.device)  # another model may run on another one
        if self.decode_steps.takes(batch):
            return self.decode_steps(batch)
        self.decode_steps.forget()
        before, self._chunk = self._chunk, None
        start = self.language_model.start(self.embed(batch.token_ids(), batch.soft()), batch.positions)
        hidden = self.language_model(start, batch)
        if hidden is None:
            # Computed chunk by chunk, or the graph of the whole prompt would grow in memory. While one is computed, the
            # next one's rows are gathered and its graph is built: what is waited for is the chunk before.
            layers = [layer for one in batch.caches for layer in one.layers.values()]
            self._chunk = [layer.keys[0, 0, -1, :1] + 0 for layer in layers]
            mx.async_eval([[layer.keys, layer.values] for layer in layers], self._chunk)
            if before is not None:
                mx.eval(before)
            return None
        return self.language_model.logits(hidden)

    def begin_next(self, steps: Sequence[Step], caches: Sequence[Cache]) -> None:
        """Starts on the next decode step of these sequences, whose tokens may not be known yet."""
        self.decode_steps.begin(steps, caches)

    def decode_graph(self, token_id: int, cache: Cache) -> mx.array:
        """The logits [1, V] of a decode step, not evaluated: its graph, whose operations the benchmark counts."""
        positions = np.array([cache.offset], dtype=np.int32)
        begun = self.decode_steps.started(mx.array([token_id]), positions)
        return self.decode_steps.finished(begun, [cache]).logits

    @property
    def media_together(self) -> int:
        """Images or clips worth encoding in a call: one on a CPU, whose cores a single one keeps busy."""
        return 1 if self.device.type == mx.cpu else MEDIA_TOGETHER

    def embed_images(self, pixels: np.ndarray) -> list[mx.array]:
        """Images [B, h, w, 3] as soft tokens [n, D] each."""
        mx.set_default_device(self.device)
        return self.towers.embed_images(pixels)

    def embed_audio(self, frames: np.ndarray, mask: np.ndarray) -> list[mx.array]:
        """Clips' log-mel frames [B, T, mel], of which the mask says which are real, as soft tokens [n, D] each."""
        mx.set_default_device(self.device)
        return self.towers.embed_audio(frames, mask)

    def numpy(self, array: mx.array) -> np.ndarray:
        """Soft tokens or logits on the host, float32."""
        return np.array(array.astype(mx.float32))

    def drop_towers(self) -> None:
        """Frees both towers; the next image or clip reads them again."""
        self.towers.drop()
        mx.clear_cache()

    def close(self) -> None:
        """Frees all weights but those that another slice shares; no call may follow."""
        del self.language_model, self.decode_steps, self.towers, self.weights
        gc.collect()  # compiled steps and the modules that they belong to refer to each other
        mx.clear_cache()

    def peak_memory_bytes(self) -> int:
        """Most memory allocated on a GPU so far; 0 on the CPU."""
        return mx.get_peak_memory() if self.device.type == mx.gpu else 0

    def embed(self, token_ids: np.ndarray, soft: Soft = ()) -> mx.array:
        """[T] ids -> [T, D]: text scaled, ids of the image and audio ranges through their embedder, or soft tokens."""
        embeddings = self.language_model.embed(mx.array(token_ids))
        for start, rows in soft:
            embeddings[start : start + len(rows)] = rows  # pyright: ignore[reportArgumentType] (ours)
        for name, rows in embedder_rows(self.config, token_ids, soft).items():
            embeddings[mx.array(rows)] = self.towers.embedder(name)(token_ids[rows])
        return embeddings
