"""The top-level module, and what the core calls (g3n_mlx/interface.py).

Ids of the image and audio ranges are embedded by their modality's embedder wherever they occur, in a prompt or
decoded; its weights are read when the first such id is met. Text-only checkpoints have no embedders: there these ids
are rows of the token embeddings, as in transformers' Gemma3nForCausalLM.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from g3n_mlx.audio_config import AudioConfig
from g3n_mlx.backends.torch.cache import Cache
from g3n_mlx.backends.torch.quant import linear
from g3n_mlx.backends.torch.sampling import Sampler, Step
from g3n_mlx.backends.torch.text import Ahead, LanguageModel, RMSNorm
from g3n_mlx.backends.torch.weights import Weights, from_numpy
from g3n_mlx.checkpoint import Checkpoint
from g3n_mlx.config import ModelConfig
from g3n_mlx.sampling import SamplingParams
from g3n_mlx.vision_config import VisionConfig


class MultimodalEmbedder(nn.Module):
    """One modality's ids as text embeddings: embedding, norm, projection, norm without weight; not scaled."""

    def __init__(self, config: VisionConfig | AudioConfig, weights: Weights) -> None:
        super().__init__()
        self.vocab_offset = config.vocab_offset
        self.dtype, self.device = weights.dtype, weights.device
        self.embedding = weights.at("embedding").rows()
        self.hard_embedding_norm = RMSNorm(weights.at("hard_embedding_norm"), config.rms_norm_eps)
        self.embedding_projection = linear(weights.at("embedding_projection"))
        self.embedding_post_projection_norm = RMSNorm(None, config.rms_norm_eps)

    def forward(self, token_ids: np.ndarray) -> Tensor:
        """[T] ids of the modality's range -> [T, D]."""
        embedded = from_numpy(self.embedding.gather(token_ids - self.vocab_offset)).to(self.device, self.dtype)
        return self.embedding_post_projection_norm(self.embedding_projection(self.hard_embedding_norm(embedded)))


class Gemma3nModel(nn.Module):
    """A loaded checkpoint on one device. One sequence a call."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config: ModelConfig = checkpoint.config
        self.device = device
        self.weights = Weights(checkpoint, dtype, device)
        self.language_model = LanguageModel(self.config.text, self.weights.at("language_model"))
        self.embedders: dict[str, MultimodalEmbedder] = {}

    def make_cache(self) -> Cache:
        """An empty cache."""
        return Cache(self.config.text)

    def make_sampler(self, params: SamplingParams, prompt_ids: Sequence[int]) -> Sampler:
        """A sampler for one answer."""
        return Sampler(params, prompt_ids, self.config.text.vocab_size, self.device)

    @torch.no_grad()
    def prefill(self, token_ids: np.ndarray, cache: Cache, sampler: Sampler | None) -> Step | None:
        """Appends [T] ids to the cache; with a sampler, draws the token that follows."""
        ahead = self.language_model.ahead(self.embed(token_ids), cache.offset)
        hidden = self.language_model(ahead, token_ids, cache, "none" if sampler is None else "last")
        if sampler is None:
            return None
        assert hidden is not None
        return self.drawn(hidden, cache, sampler)

    @torch.no_grad()
    def decode(self, step: Step, cache: Cache, sampler: Sampler) -> Step:
        """Appends the step's token to the cache and draws the next one."""
        token_ids = np.array([int(step)])
        ahead = step.ahead
        if ahead is None or self.config.embedder_of(int(step)) is not None:
            ahead = self.language_model.ahead(self.embed(token_ids), cache.offset)
        hidden = self.language_model(ahead, token_ids, cache, "last")
        assert hidden is not None
        return self.drawn(hidden, cache, sampler)

    @torch.no_grad()
    def logits(self, token_ids: np.ndarray, cache: Cache) -> np.ndarray:
        """Appends [T] ids to the cache; every row's logits, float32 [T, V]."""
        ahead = self.language_model.ahead(self.embed(token_ids), cache.offset)
        hidden = self.language_model(ahead, token_ids, cache, "all")
        assert hidden is not None
        return self.language_model.logits(hidden).cpu().numpy()

    def peak_memory_bytes(self) -> int:
        """Most memory allocated on a GPU so far; 0 on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def drawn(self, hidden: Tensor, cache: Cache, sampler: Sampler) -> Step:
        """Draws from the last row's logits and, on a device that works beside us, starts on the next step."""
        step = sampler.draw(self.language_model.logits(hidden)[0])
        if self.device.type == "cuda" and self.language_model.embedding_rows is None:
            step.ahead = self.started(step.token, cache)
        return step

    def started(self, token: Tensor, cache: Cache) -> Ahead:
        """The next forward pass as far as it needs no token on the host, taking the token for one of text."""
        return self.language_model.ahead(self.language_model.embed(token), cache.offset)

    def embed(self, token_ids: np.ndarray) -> Tensor:
        """[T] ids -> [T, D]: text scaled, ids of the image and audio ranges through their embedder."""
        embeddings = self.language_model.embed(torch.from_numpy(token_ids).to(self.device))
        embedders = np.array([self.config.embedder_of(token_id) or "" for token_id in token_ids.tolist()])
        for name in set(embedders.tolist()) - {""}:
            (places,) = np.nonzero(embedders == name)
            embeddings[torch.from_numpy(places).to(self.device)] = self.embedder(name)(token_ids[places])
        return embeddings

    def embedder(self, name: str) -> MultimodalEmbedder:
        """An embedder, read at its first use."""
        if name not in self.embedders:
            config = self.config.vision if name == "embed_vision" else self.config.audio
            assert config is not None
            self.embedders[name] = MultimodalEmbedder(config, self.weights.at(name))
        return self.embedders[name]
