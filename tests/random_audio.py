"""Seeded random checkpoints with an audio tower of any shape, as published, beside a text model of nothing."""

from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_files import write_folder
from random_checkpoint import BASE, random_tensors

from g3n_mlx.config.audio import AudioConfig, audio_manifest
from g3n_mlx.config.manifest import embedder_manifest, text_manifest
from g3n_mlx.config.text import FULL, TextConfig

TEXT: dict[str, Any] = BASE | {
    "num_hidden_layers": 1,
    "num_kv_shared_layers": 0,
    "intermediate_size": [8],
    "activation_sparsity_pattern": [0.0],
    "layer_types": [FULL],
}

AUDIO: dict[str, Any] = {
    "model_type": "gemma3n_audio",
    "vocab_size": 3,
    "vocab_offset": 130,
    "hidden_size": 48,
    "rms_norm_eps": 1e-6,
    "input_feat_size": 20,
    "gradient_clipping": 1e10,
    "conf_attention_chunk_size": 4,
    "conf_attention_context_left": 5,
    "conf_attention_context_right": 0,
    "conf_attention_logit_cap": 50.0,
    "conf_num_attention_heads": 3,
    "conf_num_hidden_layers": 2,
    "conf_conv_kernel_size": 5,
    "conf_reduction_factor": 4,
    "conf_residual_weight": 0.5,
    "sscp_conv_channel_size": [6, 4],
    "sscp_conv_group_norm_eps": 1e-3,
    "sscp_conv_kernel_size": [[3, 3], [3, 3]],
    "sscp_conv_stride_size": [[2, 2], [2, 2]],
}


def write_audio(folder: Path, seed: int = 0, dtype: Any = np.float32, **changes: Any) -> Path:
    """A checkpoint whose audio tower is AUDIO's but for the changes."""
    raw = AUDIO | changes
    text, audio = TextConfig.from_dict(TEXT), AudioConfig.from_dict(raw, 8, "AUDIO")
    config = {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "text_config": TEXT,
        "audio_config": raw,
        "audio_soft_tokens_per_image": 8,
    }
    tensors = {f"model.{name}": np.zeros(shape, dtype) for name, shape in text_manifest(text).items()}
    shapes = audio_manifest(audio) | embedder_manifest("embed_audio", audio, text.hidden_size)
    for index, (name, shape) in enumerate(shapes.items()):  # one by one: all of them in float32 may be too much
        [(stored, values)] = random_tensors({name: shape}, seed + index).items()
        tensors[stored] = values.astype(dtype)
    return write_folder(folder, config, tensors)
