"""The shape of the demo model: a Gemma 3n in everything but size, as its config.json says it.

Every inner dimension of the language model is a multiple of 64, so that 4-bit groups of 64 apply where they do in
the released models. Layers come in blocks of two, sliding and full; the first two blocks own keys and values, the
last two share them, and a slice may leave out one of those. Vision sees 96 pixels as 3 x 3 soft tokens, audio
hears up to four seconds as 25. What timm fixes (2048 features out of the vision tower) is as published.
"""

from typing import Any

LAYERS = 8
FFN = 512
TEXT_VOCAB, IMAGE_VOCAB, AUDIO_VOCAB = 1024, 128, 128
IMAGE_SIZE = 96
CLIP_SECONDS = 4
IMAGE_TOKENS, AUDIO_TOKENS = 9, 25
SPECIAL_IDS = {
    "<start_of_image>": TEXT_VOCAB - 2,
    "<start_of_audio>": TEXT_VOCAB - 1,
    "<end_of_image>": TEXT_VOCAB,
    "<image_soft_token>": TEXT_VOCAB + 1,
    "<end_of_audio>": TEXT_VOCAB + IMAGE_VOCAB,
    "<audio_soft_token>": TEXT_VOCAB + IMAGE_VOCAB + 1,
}
VOCAB = TEXT_VOCAB + IMAGE_VOCAB + AUDIO_VOCAB


def edge_residual(channels: int, stride: int, expansion: float) -> dict[str, Any]:
    """A block of the first stage."""
    return {
        "block_type": "er",
        "exp_kernel_size": 3,
        "pw_kernel_size": 1,
        "exp_ratio": expansion,
        "force_in_chs": 0,
    } | _common(channels, stride)


def inverted_bottleneck(channels: int, stride: int, expansion: float, start: int, middle: int) -> dict[str, Any]:
    """A universal inverted residual; start and middle are the sizes of its depthwise kernels, 0 for none."""
    return {
        "block_type": "uir",
        "dw_kernel_size_start": start,
        "dw_kernel_size_mid": middle,
        "dw_kernel_size_end": 0,
        "exp_ratio": expansion,
    } | _common(channels, stride)


def attention(channels: int, heads: int, dim: int, kv_stride: int) -> dict[str, Any]:
    """Multi-query attention."""
    return {
        "block_type": "mqa",
        "dw_kernel_size": 3,
        "num_heads": heads,
        "key_dim": dim,
        "value_dim": dim,
        "kv_stride": kv_stride,
    } | _common(channels, 1)


def _common(channels: int, stride: int) -> dict[str, Any]:
    return {"out_chs": channels, "stride": stride, "act_layer": None, "noskip": False, "se_ratio": 0.0}


STAGES = [
    [edge_residual(16, 2, 4.0), edge_residual(16, 1, 2.0)],
    [inverted_bottleneck(32, 2, 6.0, 3, 5), inverted_bottleneck(32, 1, 4.0, 5, 0)],
    [
        inverted_bottleneck(64, 2, 6.0, 5, 5),
        inverted_bottleneck(64, 1, 4.0, 5, 0),
        attention(64, 4, 16, 2),
        inverted_bottleneck(64, 1, 2.0, 0, 0),
    ],
    [
        inverted_bottleneck(96, 2, 6.0, 5, 5),
        attention(96, 4, 24, 1),
        inverted_bottleneck(96, 1, 2.0, 0, 0),
        attention(96, 4, 24, 1),
        inverted_bottleneck(96, 1, 2.0, 0, 0),
    ],
]

TEXT: dict[str, Any] = {
    "activation_sparsity_pattern": [0.9] * 2 + [0.0] * (LAYERS - 2),
    "altup_active_idx": 0,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 128,
    "hidden_size_per_layer_input": 64,
    "initializer_range": 0.02,
    "intermediate_size": [FFN] * LAYERS,
    "laurel_rank": 64,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "max_position_embeddings": 32768,
    "model_type": "gemma3n_text",
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": LAYERS // 2,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 64,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": TEXT_VOCAB,
}

VISION: dict[str, Any] = {
    "architecture": "mobilenetv5_300m_enc",
    "do_pooling": False,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "label_names": ["LABEL_0", "LABEL_1"],
    "model_args": {"block_args": STAGES, "msfa_output_resolution": 3, "stem_size": 16},
    "model_type": "gemma3n_vision",
    "num_classes": 2,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "vocab_offset": TEXT_VOCAB,
    "vocab_size": IMAGE_VOCAB,
}

AUDIO: dict[str, Any] = {
    "conf_attention_chunk_size": 12,
    "conf_attention_context_left": 13,
    "conf_attention_context_right": 0,
    "conf_attention_logit_cap": 50.0,
    "conf_conv_kernel_size": 5,
    "conf_num_attention_heads": 4,
    "conf_num_hidden_layers": 3,
    "conf_reduction_factor": 4,
    "conf_residual_weight": 0.5,
    "gradient_clipping": 1e10,
    "hidden_size": 96,
    "input_feat_size": 128,
    "model_type": "gemma3n_audio",
    "rms_norm_eps": 1e-6,
    "sscp_conv_channel_size": [16, 8],
    "sscp_conv_group_norm_eps": 0.001,
    "sscp_conv_kernel_size": [[3, 3], [3, 3]],
    "sscp_conv_stride_size": [[2, 2], [2, 2]],
    "torch_dtype": "bfloat16",
    "vocab_offset": TEXT_VOCAB + IMAGE_VOCAB,
    "vocab_size": AUDIO_VOCAB,
}

CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3nForConditionalGeneration"],
    "audio_config": AUDIO,
    "audio_soft_tokens_per_image": AUDIO_TOKENS,
    "audio_token_id": SPECIAL_IDS["<audio_soft_token>"],
    "boa_token_id": SPECIAL_IDS["<start_of_audio>"],
    "boi_token_id": SPECIAL_IDS["<start_of_image>"],
    "eoa_token_id": SPECIAL_IDS["<end_of_audio>"],
    "eoi_token_id": SPECIAL_IDS["<end_of_image>"],
    "eos_token_id": [1, 106],
    "image_token_id": SPECIAL_IDS["<image_soft_token>"],
    "initializer_range": 0.02,
    "model_type": "gemma3n",
    "text_config": TEXT,
    "torch_dtype": "bfloat16",
    "vision_config": VISION,
    "vision_soft_tokens_per_image": IMAGE_TOKENS,
}

GENERATION = {"bos_token_id": 2, "cache_implementation": "hybrid", "do_sample": False, "eos_token_id": [1, 106],
              "pad_token_id": 0, "top_k": 64, "top_p": 0.95}  # fmt: skip

PREPROCESSOR: dict[str, Any] = {
    "data_format": "channels_first",
    "dither": 0.0,
    "do_convert_rgb": True,
    "do_normalize": False,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "Gemma3nAudioFeatureExtractor",
    "feature_size": 128,
    "fft_length": 1024,
    "fft_overdrive": True,
    "frame_length": 512,
    "hop_length": 160,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessorFast",
    "image_seq_length": IMAGE_TOKENS,
    "image_std": [0.5, 0.5, 0.5],
    "input_scale_factor": 1.0,
    "max_frequency": 7600.0,
    "mel_floor": 1e-05,
    "min_frequency": 125.0,
    "padding_side": "right",
    "padding_value": 0.0,
    "per_bin_mean": None,
    "per_bin_stddev": None,
    "preemphasis": 0.97,
    "preemphasis_htk_flavor": True,
    "processor_class": "Gemma3nProcessor",
    "resample": 2,
    "rescale_factor": 1 / 255,
    "return_attention_mask": True,
    "sampling_rate": 16000,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
}

PROCESSOR = {"audio_seq_length": AUDIO_TOKENS, "image_seq_length": IMAGE_TOKENS, "processor_class": "Gemma3nProcessor"}
