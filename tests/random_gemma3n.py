"""Seeded random checkpoints of all three modalities, every number of whose shape is drawn, and prompts for them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_files import write_folder
from random_audio import AUDIO
from random_checkpoint import BASE, pattern, random_tensors
from random_vision import er, mqa, uir, vision_tensors

from g3n_mlx.config.audio import audio_manifest
from g3n_mlx.config.manifest import dead_manifest, embedder_manifest, text_manifest
from g3n_mlx.config.model import ModelConfig

IMAGE, AUDIO_CLIP = "image", "audio"


@dataclass(frozen=True)
class MediaPrompt:
    """Ids, and the pictures and clips whose placeholders stand among them, in order."""

    token_ids: np.ndarray
    spans: list[tuple[int, int, str, int]]  # start, length, kind, which of its kind
    pictures: np.ndarray  # [n, h, w, 3]
    clips: list[tuple[np.ndarray, np.ndarray]]  # frames [T, mel], mask [T]


def write_gemma3n(folder: Path, seed: int) -> Path:
    """A checkpoint as published, in float32."""
    draw = np.random.default_rng(seed)
    config = random_config(draw)
    model = ModelConfig.from_dict(config)
    assert model.vision is not None
    assert model.audio is not None
    text_width = model.text.hidden_size
    tensors = random_tensors(text_manifest(model.text) | dead_manifest(model.text), seed)
    tensors = {name.replace("model.", "model.language_model.", 1): array for name, array in tensors.items()}
    rest = embedder_manifest("embed_audio", model.audio, text_width) | audio_manifest(model.audio)
    tensors |= random_tensors(rest, seed + 1)
    tensors |= vision_tensors(model.vision, text_width, seed + 2, np.float32)
    return write_folder(folder, config, tensors)


def random_config(draw: np.random.Generator) -> dict[str, Any]:
    text_ids, image_ids, audio_ids = (int(draw.integers(low, low + 40)) for low in (60, 2, 2))
    vocab_size = text_ids + image_ids + audio_ids
    resolution = int(draw.integers(1, 5))
    return {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "text_config": random_text(draw, vocab_size, text_ids),
        "vision_config": {
            "model_type": "gemma3n_vision",
            "architecture": "mobilenetv5_300m_enc",
            "do_pooling": False,
            "hidden_size": 2048,  # timm's encoder has no other
            "rms_norm_eps": float(draw.choice([1e-6, 1e-3])),
            "vocab_offset": text_ids,
            "vocab_size": image_ids,
            "model_args": random_network(draw, resolution),
        },
        "audio_config": random_audio(draw, text_ids + image_ids, audio_ids),
        "vision_soft_tokens_per_image": resolution**2,
        "audio_soft_tokens_per_image": int(draw.integers(12, 30)),
        "image_token_id": text_ids + int(draw.integers(image_ids)),
        "audio_token_id": text_ids + image_ids + int(draw.integers(audio_ids)),
        "eos_token_id": 1,
    }


def random_text(draw: np.random.Generator, vocab_size: int, text_ids: int) -> dict[str, Any]:
    layers, inputs = int(draw.integers(2, 6)), int(draw.integers(2, 5))
    kv_heads, group = int(draw.integers(1, 4)), int(draw.integers(1, 4))
    kinds = pattern(layers, int(draw.integers(0, 4)))
    owned = max(1, len(set(kinds)), kinds.index(kinds[-1]) + 1, *(kinds.index(kind) + 1 for kind in set(kinds)))
    return BASE | {
        "architectures": ["Gemma3nForCausalLM"],
        "vocab_size": vocab_size,
        # Ids beyond the table are the first row: the image and audio ranges, and here some of the text's.
        "vocab_size_per_layer_input": text_ids - int(draw.integers(0, 3)),
        "hidden_size": kv_heads
        * group
        * int(draw.integers(24 // (kv_heads * group) + 1, 40 // (kv_heads * group) + 2)),
        "hidden_size_per_layer_input": int(draw.integers(9, 20)),
        "num_hidden_layers": layers,
        "num_kv_shared_layers": int(draw.integers(0, layers - owned + 1)),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * group,
        "head_dim": 2 * int(draw.integers(4, 9)),
        "intermediate_size": draw.integers(8, 60, layers).tolist(),
        "activation_sparsity_pattern": draw.choice([0.0, 0.5, 0.95], layers).tolist(),
        "layer_types": kinds,
        "sliding_window": int(draw.integers(2, 30)),
        "laurel_rank": int(draw.integers(1, 9)),
        "altup_num_inputs": inputs,
        "altup_active_idx": int(draw.integers(inputs)),
    }


def random_network(draw: np.random.Generator, resolution: int) -> dict[str, Any]:
    """A stage table for timm's builder. Every stage shrinks the picture, so that any of them can be fused."""
    num_stages = int(draw.integers(2, 5))
    stages = []
    for stage in range(num_stages):
        width = 8 * int(draw.integers(1, 6))
        blocks = [er(width, int(draw.integers(2, 5)), 2) if stage == 0 else random_inverted(draw, width, 2)]
        for _ in range(int(draw.integers(0, 3))):
            kind = draw.integers(3) if stage else 0
            inner = er(width, int(draw.integers(1, 5))) if kind == 0 else random_inverted(draw, width)
            blocks.append(inner if kind < 2 else random_attention(draw, width))
        if blocks[-1]["block_type"] == "mqa":  # timm has no name for the output of such a stage
            blocks.append(random_inverted(draw, width))
        stages.append(blocks)
    fused = draw.choice(num_stages + 1, int(draw.integers(1, 3)), replace=False).tolist()
    return {
        "block_args": stages,
        "msfa_indices": [index if draw.integers(2) else index - num_stages - 1 for index in fused],
        "msfa_output_resolution": resolution,
        "stem_size": 8 * int(draw.integers(1, 4)),
    }


def random_inverted(draw: np.random.Generator, width: int, stride: int = 1) -> dict[str, Any]:
    start, mid, end = (int(draw.choice([0, 2, 3, 5])) for _ in range(3))
    if stride == 2 and not (start or mid or end):
        mid = 3  # or nothing would stride
    return uir(width, start, mid, end, stride=stride, ratio=float(draw.choice([1.0, 1.5, 3.0])))


def random_attention(draw: np.random.Generator, width: int) -> dict[str, Any]:
    heads, key_dim, value_dim = draw.integers(1, 5), draw.integers(3, 17), draw.integers(3, 17)
    strides = {"kv_stride": int(draw.integers(1, 4)), "kernel": int(draw.integers(2, 6))}
    return mqa(width, int(heads), int(key_dim), value_dim=int(value_dim), **strides)


def random_audio(draw: np.random.Generator, vocab_offset: int, vocab_size: int) -> dict[str, Any]:
    heads = int(draw.integers(1, 5))

    def pair(low: int, high: int) -> list[int]:
        return draw.integers(low, high, 2).tolist()

    return AUDIO | {
        "vocab_offset": vocab_offset,
        "vocab_size": vocab_size,
        "hidden_size": heads * 2 * int(draw.integers(1, 8)),
        "rms_norm_eps": float(draw.choice([1e-6, 1e-3])),
        "input_feat_size": int(draw.integers(9, 40)),
        "gradient_clipping": float(draw.choice([1e10, 1.5])),
        "conf_attention_chunk_size": int(draw.integers(1, 9)),
        "conf_attention_context_left": int(draw.integers(0, 12)),
        "conf_attention_context_right": int(draw.integers(0, 6)),
        "conf_attention_logit_cap": float(draw.choice([50.0, 2.0])),
        "conf_num_attention_heads": heads,
        "conf_num_hidden_layers": int(draw.integers(1, 4)),
        "conf_conv_kernel_size": int(draw.integers(1, 8)),
        "conf_reduction_factor": int(draw.integers(1, 5)),
        "conf_residual_weight": float(draw.choice([0.5, 1.25])),
        "sscp_conv_channel_size": pair(1, 9),
        "sscp_conv_kernel_size": [pair(1, 5), pair(1, 5)],
        "sscp_conv_stride_size": [pair(1, 4), pair(1, 3)],
    }


def random_prompt(config: dict[str, Any], seed: int) -> MediaPrompt:
    """Text, ids of the image and audio ranges, two pictures of one size and three clips, the last of one frame."""
    draw = np.random.default_rng(seed + 1000)
    model = ModelConfig.from_dict(config)
    assert model.vision is not None
    assert model.audio is not None
    height, width = draw.integers(20, 90, 2).tolist()
    most = model.audio.soft_tokens * model.audio.total_reduction
    lengths = [min(most, int(draw.integers(2, 70))), min(most, int(draw.integers(2, 70))), 1]
    clips = []
    for length in lengths:
        frames = draw.standard_normal((length, model.audio.input_feat_size)).astype(np.float32) - 2
        clips.append((frames, np.arange(length) < draw.integers(length // 2, length + 1)))
    placeholders = {
        IMAGE: (config["image_token_id"], model.vision.soft_tokens),
        AUDIO_CLIP: (config["audio_token_id"], model.audio.soft_tokens),
    }
    others = [
        i for i in range(model.text.vocab_size) if i not in [placeholder for placeholder, _ in placeholders.values()]
    ]
    ids: list[int] = [2]
    spans: list[tuple[int, int, str, int]] = []
    for kind, which in [(IMAGE, 0), (AUDIO_CLIP, 0), (AUDIO_CLIP, 1), (IMAGE, 1), (AUDIO_CLIP, 2)]:
        ids += draw.choice(others, int(draw.integers(0, 5))).tolist()
        placeholder, length = placeholders[kind]
        spans.append((len(ids), length, kind, which))
        ids += [placeholder] * length
    ids += draw.choice(others, 3).tolist()
    return MediaPrompt(np.array(ids), spans, draw.random((2, height, width, 3), np.float32), clips)
