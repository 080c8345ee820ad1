"""The audio tower: every part against the goldens, other shapes against transformers, and what padding may touch."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import read_config, read_folder
from devices import tolerance
from random_audio import write_audio

from g3n_mlx.checkpoint.folder import Checkpoint

TOLERANCE = tolerance(1e-4)  # of the largest value
CLIPS = ("clip0", "clip1")
LENGTHS = (1, 2, 7, 16, 17, 75)
PREFIX = "model.audio_tower."


def tower_of(framework: Any, folder: Path, dtype: str = "float32") -> Any:
    checkpoint = Checkpoint.open(folder)
    weights = framework.weights(checkpoint, dtype, path="audio_tower")
    return framework.module("audio").AudioTower(checkpoint.config.audio, weights)


def close(ours: np.ndarray, reference: np.ndarray, tolerance: float = TOLERANCE, name: str = "") -> None:
    assert ours.shape == reference.shape
    limit = tolerance * np.abs(reference).max()
    np.testing.assert_allclose(ours, reference, rtol=0, atol=limit, err_msg=name)


# The tiny checkpoint.


@pytest.fixture(scope="module")
def golden(golden_arrays):
    return golden_arrays("audio_encoder")


@pytest.fixture(scope="module")
def tiny(framework, tiny_folder):
    return tower_of(framework, tiny_folder)


@pytest.fixture(params=CLIPS)
def clip(request, golden):
    start = f"{request.param}."
    return {name.removeprefix(start): values for name, values in golden.items() if name.startswith(start)}


def channels_last(framework: Any, x: np.ndarray) -> np.ndarray:
    """[B, C, T, F] as the backend has it."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if framework.name == "mlx" else x


def test_subsampling(framework, tiny, clip):
    sscp = tiny.subsample_conv_projection
    conv0, conv1 = (channels_last(framework, clip[name]) for name in ("conv0", "conv1"))
    frames = channels_last(framework, clip["input_features"][:, None])
    close(framework.numpy(sscp.conv_0(framework.array(frames))), conv0)
    close(framework.numpy(sscp.conv_1(framework.array(conv0))), conv1)
    close(framework.numpy(sscp(framework.array(clip["input_features"]))), clip["subsampled"])


def test_parts_of_the_conformer(framework, tiny, clip):
    first, second = tiny.conformer
    mask = framework.array(clip["valid_frames"])

    def check(ours, name):
        close(framework.numpy(ours), clip[name], name=name)

    check(first.ffw_layer_start(framework.array(clip["subsampled"])), "conformer0.ffw_layer_start")
    check(first.attention(framework.array(clip["conformer0.ffw_layer_start"]), mask), "conformer0.attention")
    silenced = clip["conformer0.attention"] * clip["valid_frames"][..., None]
    check(first.lconv1d(framework.array(silenced)), "conformer0.lconv1d")
    check(first.ffw_layer_end(framework.array(clip["conformer0.lconv1d"])), "conformer0.ffw_layer_end")
    check(first(framework.array(clip["subsampled"]), mask), "conformer0")
    check(second(framework.array(clip["conformer0"]), mask), "conformer1")


def test_encodings_and_mask(framework, tiny, clip):
    encodings, mask = tiny(framework.array(clip["input_features"]), framework.array(clip["input_features_mask"]))
    close(framework.numpy(encodings), clip["encodings"])
    np.testing.assert_array_equal(framework.numpy(mask).astype(bool), ~clip["padding_mask"])


@pytest.mark.usefixtures("bfloat16_products")
def test_bfloat16_stays_bfloat16(framework, tiny_folder, clip, golden_json, request):
    tower = tower_of(framework, tiny_folder, "bfloat16")
    from_numpy = framework.module("weights").from_numpy
    x = tower.subsample_conv_projection(from_numpy(clip["input_features"].astype(ml_dtypes.bfloat16)))
    seen = [x, *(block(x, framework.array(clip["valid_frames"])) for block in tower.conformer)]
    encodings, _ = tower(framework.array(clip["input_features"]), framework.array(clip["input_features_mask"]))
    assert all(str(one.dtype).endswith("bfloat16") for one in (*seen, encodings))
    # As far from float32 as the reference's own bfloat16 is, with room for another CPU.
    noise = golden_json("noise")[f"audio_encoder.{request.node.callspec.params['clip']}.encodings"]["bfloat16"]
    assert 0 < np.abs(framework.numpy(encodings) - clip["encodings"]).max() < 3 * noise


def test_what_stands_in_padding_reaches_no_sound(framework, tiny, clip):
    """Inside the conformer; before it, convolutions and their norm see padding, as in the reference."""
    block, x = tiny.conformer[0], clip["subsampled"]
    mask = np.ones(x.shape[:2], bool)
    mask[:, 5:9] = mask[:, -3:] = False
    other = np.where(mask[..., None], x, 7 - x)
    ours, others = (framework.numpy(block(framework.array(one), framework.array(mask))) for one in (x, other))
    np.testing.assert_array_equal(ours[mask], others[mask])
    whole = framework.numpy(block(framework.array(x), framework.array(np.ones_like(mask))))
    assert np.abs(whole[mask] - ours[mask]).max() > 0.1  # and it is no sound


def test_a_clip_does_not_depend_on_its_neighbours(framework, tiny, golden):
    frames = golden["clip1.input_features"][:, :128]
    both = np.concatenate([golden["clip0.input_features"], frames])
    mask = np.ones(both.shape[:2], bool)
    together, _ = tiny(framework.array(both), framework.array(mask))
    alone, _ = tiny(framework.array(frames), framework.array(mask[1:]))
    close(framework.numpy(together)[1:], framework.numpy(alone))


def test_torch_tower_can_be_trained(frameworks, tiny_folder):
    torch = pytest.importorskip("torch")
    tower = tower_of(frameworks["torch"], tiny_folder).requires_grad_(True)
    frames = torch.randn(2, 50, 128, generator=torch.Generator().manual_seed(0))
    encodings, _ = tower(frames, torch.ones(2, 50, dtype=torch.bool))
    encodings.square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


# Other shapes.

SHAPES: dict[str, dict[str, Any]] = {
    "as_published_but_small": {},
    "no_context": {"conf_attention_context_left": 0},
    "only_itself": {"conf_attention_context_left": 1, "conf_attention_chunk_size": 1},
    "sees_ahead": {"conf_attention_context_right": 3},
    "context_far_wider_than_a_chunk": {
        "conf_attention_chunk_size": 2,
        "conf_attention_context_left": 9,
        "conf_attention_context_right": 7,
    },
    "only_ahead": {"conf_attention_context_left": 1, "conf_attention_context_right": 2},
    "chunk_longer_than_the_clip": {"conf_attention_chunk_size": 50, "conf_attention_context_right": 1},
    "low_cap": {"conf_attention_logit_cap": 0.7},
    "short_kernel": {"conf_conv_kernel_size": 1},
    "long_kernel": {"conf_conv_kernel_size": 12},
    "no_reduction": {"conf_reduction_factor": 1},
    "reduction_of_three": {"conf_reduction_factor": 3},
    "one_head": {"conf_num_attention_heads": 1, "conf_num_hidden_layers": 1},
    "many_heads": {"conf_num_attention_heads": 12, "hidden_size": 60},
    "other_convolutions": {
        "sscp_conv_channel_size": [5, 9],
        "sscp_conv_kernel_size": [[4, 3], [2, 7]],
        "sscp_conv_stride_size": [[3, 1], [1, 2]],
        "input_feat_size": 17,
    },
    "kernels_of_one_row_or_column": {"sscp_conv_kernel_size": [[1, 3], [3, 1]], "sscp_conv_channel_size": [6, 3]},
    "stride_longer_than_kernel": {
        "sscp_conv_kernel_size": [[2, 2], [3, 3]],
        "sscp_conv_stride_size": [[5, 4], [2, 1]],
    },
    "other_eps_and_weights": {
        "rms_norm_eps": 0.3,
        "sscp_conv_group_norm_eps": 0.5,
        "conf_residual_weight": 1.25,
        "gradient_clipping": 0.8,
    },
}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = request.param
    return write_audio(tmp_path_factory.mktemp(shape), seed=len(shape), **SHAPES[shape])


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Encodings and mask (True = sound) of transformers."""
    torch = pytest.importorskip("torch")
    # Not hidden, as in test_other_shapes.py.
    if importlib.util.find_spec("torchvision"):
        importlib.import_module("golden.reference_builder.torchvision_stubs").declare_missing_operators()
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
    encoder = modeling.Gemma3nAudioEncoder(transformers.Gemma3nAudioConfig(**read_config(folder)["audio_config"]))
    tensors = {name: torch.from_numpy(values.copy()) for name, values in read_folder(folder).items()}
    encoder.load_state_dict({name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)})

    def encoded(frames: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            output = encoder(torch.from_numpy(frames), ~torch.from_numpy(mask))
        return output.last_hidden_state.numpy(), ~output.audio_mel_mask.numpy()

    return encoded


def clips_of(length: int, bands: int) -> tuple[np.ndarray, np.ndarray]:
    """Four clips as one batch: whole, padded at the end, with padding inside, and all padding."""
    generator = np.random.default_rng(length)
    frames = generator.standard_normal((4, length, bands)).astype(np.float32) - 2
    mask = np.ones((4, length), bool)
    mask[1, length * 2 // 3 :] = False
    mask[2, length // 4 : length // 2] = False
    mask[3] = False
    return frames, mask


@pytest.mark.parametrize("length", LENGTHS)
def test_other_shapes_are_the_references(frameworks, folder, reference, length):
    frames, mask = clips_of(length, read_config(folder)["audio_config"]["input_feat_size"])
    expected, expected_mask = reference(frames, mask)
    assert np.abs(expected).max() > 0.1
    for name, framework in frameworks.items():
        encodings, valid = tower_of(framework, folder)(framework.array(frames), framework.array(mask))
        np.testing.assert_array_equal(framework.numpy(valid).astype(bool), expected_mask, err_msg=name)
        close(framework.numpy(encodings), expected, name=name)
