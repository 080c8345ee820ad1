"""audio_config: what is read, what follows from it, and what is refused."""

import json

import numpy as np
import pytest

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.config.audio import AudioConfig, audio_manifest

# As published with google/gemma-3n-E4B; `sscp_conv_eps` is its first spelling.
PUBLISHED = json.loads("""{
    "model_type": "gemma3n_audio", "vocab_size": 128, "vocab_offset": 262272, "input_feat_size": 128,
    "hidden_size": 1536, "rms_norm_eps": 1e-06, "gradient_clipping": 10000000000.0,
    "conf_attention_chunk_size": 12, "conf_attention_context_left": 13, "conf_attention_context_right": 0,
    "conf_attention_logit_cap": 50.0, "conf_num_attention_heads": 8, "conf_num_hidden_layers": 12,
    "conf_conv_kernel_size": 5, "conf_reduction_factor": 4, "conf_residual_weight": 0.5,
    "sscp_conv_channel_size": [128, 32], "sscp_conv_eps": 0.001,
    "sscp_conv_kernel_size": [[3, 3], [3, 3]], "sscp_conv_stride_size": [[2, 2], [2, 2]]
}""")


def read(**changes):
    return AudioConfig.from_dict(PUBLISHED | changes, 188, "config.json, audio_config")


def test_published_facts():
    config = read()
    assert config.head_dim == 192
    assert (config.past_horizon, config.relative_span, config.context_size) == (12, 13, 24)
    assert config.sscp_frequencies == (64, 32)
    assert (config.time_stride, config.total_reduction) == (4, 16)
    assert config.soft_tokens == 188 == -(-2997 // config.total_reduction)
    parameters = sum(int(np.prod(shape)) for shape in audio_manifest(config).values())
    assert parameters == 681_348_640  # the published tower's


def test_manifest_is_what_a_checkpoint_holds(tiny_folder):
    checkpoint = Checkpoint.open(tiny_folder)
    held = {name: checkpoint.info(name).shape for name in checkpoint.names if name.startswith("audio_tower.")}
    assert checkpoint.config.audio is not None
    assert audio_manifest(checkpoint.config.audio) == held


def test_frequencies_follow_kernels_and_strides():
    config = read(input_feat_size=17, sscp_conv_kernel_size=[[4, 3], [2, 7]], sscp_conv_stride_size=[[3, 1], [5, 2]])
    assert config.sscp_frequencies == (17, 7)
    assert config.total_reduction == 3 * 5 * 4


@pytest.mark.parametrize(("left", "right", "chunk"), [(13, 0, 12), (0, 0, 1), (1, 2, 3), (5, 7, 2)])
def test_window_and_timing_signal(left, right, chunk):
    config = read(conf_attention_context_left=left, conf_attention_context_right=right, conf_attention_chunk_size=chunk)
    past = max(0, left - 1)
    window = config.window()
    assert window.shape == (chunk, chunk + past + right)
    for query in range(chunk):  # key c of the context stands `past` positions before query c
        near = [-past <= key - past - query <= right for key in range(window.shape[1])]
        assert window[query].tolist() == near
    signal = config.timing_signal()
    assert signal.shape == (past + 1 + right, 1536)
    assert signal.dtype == np.float32
    for row, position in enumerate(range(past, -right - 1, -1)):
        angles = position * 1e4 ** (-np.arange(768) / 767)
        np.testing.assert_allclose(signal[row], np.concatenate([np.sin(angles), np.cos(angles)]), rtol=0, atol=3e-6)


def test_new_spelling_of_the_group_norms_eps_wins():
    assert read().sscp_conv_group_norm_eps == 0.001
    assert read(sscp_conv_group_norm_eps=0.25).sscp_conv_group_norm_eps == 0.25


@pytest.mark.parametrize("key", sorted(PUBLISHED.keys() - {"model_type", "sscp_conv_eps"}))
def test_a_missing_key_is_named(key):
    raw = {name: value for name, value in PUBLISHED.items() if name != key}
    with pytest.raises(ValueError, match=f"config.json, audio_config: the key '{key}' is missing"):
        AudioConfig.from_dict(raw, 188, "config.json, audio_config")


def test_a_missing_eps_is_named_as_it_is_now():
    raw = {name: value for name, value in PUBLISHED.items() if name != "sscp_conv_eps"}
    with pytest.raises(ValueError, match="'sscp_conv_group_norm_eps' is missing"):
        AudioConfig.from_dict(raw, 188, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 1530}, r"hidden_size \(1530\) is not a multiple of conf_num_attention_heads \(8\)"),
        ({"hidden_size": 1535, "conf_num_attention_heads": 5}, "hidden_size is 1535, expected an even number"),
        ({"conf_attention_chunk_size": 0}, "conf_attention_chunk_size is 0, expected an integer from 1 to 4096"),
        ({"conf_attention_context_left": -1}, "conf_attention_context_left is -1"),
        ({"conf_attention_context_right": 1.5}, "conf_attention_context_right is 1.5"),
        ({"conf_attention_logit_cap": 0}, "conf_attention_logit_cap is 0, expected a number above 0"),
        ({"gradient_clipping": -1.0}, "gradient_clipping is -1.0, expected a number above 0"),
        ({"conf_reduction_factor": 0}, "conf_reduction_factor is 0"),
        ({"conf_conv_kernel_size": None}, "conf_conv_kernel_size is None"),
        ({"sscp_conv_channel_size": [128]}, r"sscp_conv_channel_size has \[128\], expected 2 integers"),
        ({"sscp_conv_channel_size": 128}, "sscp_conv_channel_size has 128"),
        ({"sscp_conv_kernel_size": [[3, 3]]}, "sscp_conv_kernel_size is"),
        ({"sscp_conv_kernel_size": [[3, 3], [3, 3, 3]]}, r"sscp_conv_kernel_size has \[3, 3, 3\]"),
        ({"sscp_conv_stride_size": [[2, 2], [0, 2]]}, r"sscp_conv_stride_size has \[0, 2\]"),
        ({"input_feat_size": 0}, "input_feat_size is 0"),
        ({"input_feat_size": 2, "sscp_conv_kernel_size": [[3, 5], [3, 3]]}, "spans 5 frequencies, of which 4 are left"),
        ({"input_feat_size": 1, "sscp_conv_kernel_size": [[3, 3], [3, 4]]}, "spans 4 frequencies, of which 3 are left"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"config.json, audio_config: .*{message}"):
        read(**changes)
