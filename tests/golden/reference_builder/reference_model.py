"""The reference implementation, loaded in float32 with eager attention, plus tracing helpers."""

import contextlib
import pathlib
import types
from collections.abc import Iterator

import numpy as np
import torch
from transformers import AutoProcessor, AutoTokenizer, Gemma3nForConditionalGeneration


class Reference:
    def __init__(self, folder: pathlib.Path, dtype: torch.dtype = torch.float32, attention: str = "eager"):
        self.folder = folder
        self.dtype = dtype
        self.model = Gemma3nForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoProcessor.from_pretrained(folder)

    @property
    def language_model(self) -> torch.nn.Module:
        return self.model.model.language_model

    @property
    def vision_network(self) -> torch.nn.Module:
        return self.model.model.vision_tower.timm_model

    @property
    def audio_network(self) -> torch.nn.Module:
        return self.model.model.audio_tower

    def tokenize(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, return_tensors="pt").input_ids

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, **media) -> torch.Tensor:
        """Scores of every position; media are pixel_values [N, 3, H, W] and audio_clips, a list of
        (features [1, frames, 128], mask [1, frames]) that are encoded one by one."""
        with self._media(media) as inputs:
            return self.model(input_ids=input_ids, use_cache=False, **inputs).logits

    def encode_clip(self, features: np.ndarray, mask: np.ndarray):
        mel, valid = torch.from_numpy(features).to(self.dtype), torch.from_numpy(mask)
        return self.model.model.get_audio_features(mel, ~valid)

    @torch.no_grad()
    def greedy(self, input_ids: torch.Tensor, steps: int, **media) -> tuple[np.ndarray, np.ndarray]:
        """Greedy decoding with a key/value cache; end-of-sequence tokens do not stop it.

        Returns the chosen tokens [steps] and the logits they were chosen from [steps, vocabulary].
        """
        with self._media(media) as inputs:
            outputs = self.model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **inputs)
        tokens, scores = [], []
        for _ in range(steps):
            last = outputs.logits[:, -1]
            token = last.argmax(-1, keepdim=True)
            tokens.append(token[0, 0].item())
            scores.append(to_numpy(last[0]))
            outputs = self.model(input_ids=token, past_key_values=outputs.past_key_values, use_cache=True)
        return np.array(tokens, dtype=np.int32), np.stack(scores)

    @contextlib.contextmanager
    def _media(self, media: dict) -> Iterator[dict[str, torch.Tensor]]:
        """The model's keyword arguments.  transformers pads all clips of a call to the longest, which
        changes the last tokens of the others, so every clip is encoded alone and handed over ready."""
        media = dict(media)
        clips = media.pop("audio_clips", [])
        inputs = {name: value.to(self.dtype) for name, value in media.items()}
        if not clips:
            yield inputs
            return
        encoded = _joined([self.encode_clip(features, mask) for features, mask in clips])
        inner = self.model.model
        inner.get_audio_features = lambda *args, **kwargs: encoded
        placeholder = torch.zeros(len(clips), 1, 128, dtype=self.dtype)
        try:
            yield {**inputs, "input_features": placeholder, "input_features_mask": torch.ones(len(clips), 1).bool()}
        finally:
            del inner.get_audio_features  # the method of the class shows through again


def _joined(encoded: list) -> types.SimpleNamespace:
    """Stacks the outputs of single clips; the missing tail of a shorter one counts as padding."""
    longest = max(clip.pooler_output.shape[1] for clip in encoded)
    tails = [longest - clip.pooler_output.shape[1] for clip in encoded]
    pad = torch.nn.functional.pad
    return types.SimpleNamespace(
        pooler_output=torch.cat([pad(clip.pooler_output, (0, 0, 0, tail)) for clip, tail in zip(encoded, tails)]),
        audio_mel_mask=torch.cat(
            [pad(clip.audio_mel_mask, (0, tail), value=True) for clip, tail in zip(encoded, tails)]
        ),
    )


@contextlib.contextmanager
def recording(modules: dict[str, torch.nn.Module]) -> Iterator[dict[str, np.ndarray]]:
    """Collects the output of each named module during the calls made inside the block."""
    seen: dict[str, np.ndarray] = {}
    hooks = [module.register_forward_hook(_keep(seen, name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _keep(seen: dict[str, np.ndarray], name: str):
    def hook(module, inputs, output):
        # A copy: transformers scales the vision features in place after the tower has returned them.
        seen[name] = to_numpy(output[0] if isinstance(output, tuple) else output).copy()

    return hook


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Floating-point results as float32, everything else as it is."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def decision_margin(scores: np.ndarray) -> np.ndarray:
    """Distance between the best and the second best score of each row."""
    best_two = np.sort(scores, axis=-1)[..., -2:]
    return best_two[..., 1] - best_two[..., 0]
