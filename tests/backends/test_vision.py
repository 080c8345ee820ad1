"""The vision tower: every stage of the tiny one against the goldens, towers of quite other shapes against timm."""

import importlib
import importlib.util
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import mlx_vlm, read_config, read_folder, write_folder
from devices import tolerance
from random_vision import er, mqa, tower_tensors, uir, write_random_vision

from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.config.vision import MobileAttentionConfig, VisionConfig, vision_manifest

TOLERANCE = tolerance(1e-4)  # of the largest value
STAGES = ["stem", "stage0", "stage1", "stage2", "stage3"]


def tower(framework: Any, folder: Path, dtype: str = "float32") -> Any:
    """A checkpoint's VisionTower on the CPU."""
    weights = framework.weights(Checkpoint.open(folder), dtype, path="vision_tower")
    return framework.module("vision").VisionTower(weights.checkpoint.config.vision, weights)


def features(framework: Any, network: Any, pixels: np.ndarray) -> np.ndarray:
    """[B, 3, h, w] -> [B, C, h', w'] through a backend's own order of axes."""
    if framework.name == "torch":
        return framework.numpy(network(framework.array(pixels)))
    return framework.numpy(network(framework.array(pixels.transpose(0, 2, 3, 1)))).transpose(0, 3, 1, 2)


def distance(ours: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    assert ours.shape == expected.shape
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def golden(golden_arrays: Callable[[str], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return golden_arrays("vision_tower")


def test_stages_are_the_references(framework, tiny_folder, golden):
    network = tower(framework, tiny_folder).timm_model
    pixels = framework.array(golden["pixel_values"][:1].transpose(0, 2, 3, 1))
    for name, stage in zip(STAGES, network.stages(pixels), strict=True):
        assert distance(framework.numpy(stage).transpose(0, 3, 1, 2), golden[name]) < TOLERANCE, name


def test_features_are_the_references(framework, tiny_folder, golden):
    network = tower(framework, tiny_folder)
    for pixels, expected in zip(golden["pixel_values"], golden["msfa"], strict=True):
        # Or a transposed picture would pass.
        assert distance(expected, expected.transpose(0, 2, 1)) > 0.1
        assert distance(features(framework, network, pixels[None])[0], expected) < TOLERANCE
    assert distance(features(framework, network, golden["pixel_values"]), golden["msfa"]) < TOLERANCE


def test_kernels_with_inputs_last_are_read_as_published(framework, tiny_folder, golden, tmp_path):
    folder = write_folder(tmp_path, *mlx_vlm(read_config(tiny_folder), read_folder(tiny_folder)))
    network = tower(framework, folder)
    assert distance(features(framework, network, golden["pixel_values"][:1]), golden["msfa"][:1]) < TOLERANCE


@pytest.mark.usefixtures("bfloat16_products")
def test_bfloat16_stays_bfloat16_and_near(framework, tiny_folder, golden):
    network = tower(framework, tiny_folder, "bfloat16")
    pixels = golden["pixel_values"][:1]
    turned = framework.array(pixels.transpose(0, 2, 3, 1))
    cast = turned.to(network.dtype) if framework.name == "torch" else turned.astype(network.dtype)
    for stage in network.timm_model.stages(cast):
        assert str(stage.dtype).endswith("bfloat16")
    out = network(framework.array(pixels) if framework.name == "torch" else turned)  # the tower casts pixels itself
    assert str(out.dtype).endswith("bfloat16")
    # The reference itself moves by 0.044 in bfloat16 (noise.json).
    assert 1e-4 < distance(features(framework, network, pixels), golden["msfa"][:1]) < 0.06


# Towers of other shapes. Names say what is unusual about them.

BODY = [
    [er(16, 3, 2), er(16, 3)],
    [uir(24, 3, 5, stride=2), uir(24, 5, 0)],
    [uir(32, 5, 5, stride=2), uir(32, 0, 0, ratio=1.0), mqa(32, 3, 16, 2), uir(32, 0, 0)],
    [uir(40, 5, 5, stride=2), mqa(40, 4, 24), uir(40, 0, 0)],
]
ATTENTION = [
    [er(16, 3, 2)],
    [uir(24, 3, 3, stride=2), mqa(24, 2, 8, 3, 5), mqa(24, 1, 12, 4, 2), uir(24, 0, 0)],
    [uir(32, 3, 0, stride=2), mqa(32, 5, 8, 2, value_dim=24), mqa(24, 2, 16, 1, value_dim=8), uir(32, 3, 0)],
]
EVEN_KERNELS = [
    [er(16, 4, 2, pw_kernel_size=3), er(16, 2, pw_kernel_size=2)],
    [uir(24, 4, 2, 3, stride=2), uir(24, 2, 4, 6)],
    [uir(32, 2, 0, 4, stride=2), mqa(32, 2, 8, 2, 4), uir(32, 0, 0, 7, ratio=1.5)],
]
ODD_WIDTHS = [
    [er(11, 3, 2, 2.7), er(11, 5, 1, 1.3), er(12, 1)],
    [uir(21, 3, 7, stride=2, ratio=3.3), uir(21, 0, 3, ratio=0.4), uir(22, 3, 0)],
    [uir(35, 0, 0, 3, stride=2), uir(35, 0, 0, 5), mqa(37, 3, 7, 2), uir(37, 0, 0)],
]
# Later blocks of a stage never stride, whatever they say: timm's notation repeats the first one's stride.
REPEATED_STRIDES = [[er(16, 3, 2), er(16, 3, 2)], [uir(24, 3, 5, stride=2), uir(24, 3, 3, stride=2)]]

SHAPES: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {
    "pooled_3_by_3": ({"block_args": BODY, "msfa_output_resolution": 2}, [(96, 96)]),
    "pooled_in_oblong_tiles": ({"block_args": BODY, "msfa_output_resolution": 2}, [(64, 128), (160, 32)]),
    "as_the_finer_map": ({"block_args": BODY, "msfa_output_resolution": 6}, [(96, 96)]),
    "as_the_finer_map_in_one_axis": ({"block_args": BODY, "msfa_output_resolution": 6}, [(96, 192)]),
    "bilinear_down": ({"block_args": BODY, "msfa_output_resolution": 5}, [(112, 112), (112, 80), (101, 203)]),
    "bilinear_up": ({"block_args": BODY, "msfa_output_resolution": 9}, [(64, 80), (33, 47), (7, 1)]),
    "sizes_without_a_common_grid": ({"block_args": BODY, "msfa_output_resolution": 3}, [(75, 101), (97, 145)]),
    "attention": ({"block_args": ATTENTION, "msfa_output_resolution": 4}, [(64, 96), (67, 81)]),
    "even_kernels": ({"block_args": EVEN_KERNELS, "msfa_output_resolution": 4}, [(64, 96), (61, 83)]),
    "odd_widths": ({"block_args": ODD_WIDTHS, "msfa_output_resolution": 4, "stem_size": 10}, [(64, 72), (55, 97)]),
    "repeated_strides": ({"block_args": REPEATED_STRIDES, "msfa_output_resolution": 4}, [(64, 80)]),
    "three_fused": (
        {"block_args": BODY, "msfa_indices": [1, -1, 2], "msfa_output_resolution": 4},
        [(64, 80), (71, 57)],
    ),
    "stem_and_end_fused": ({"block_args": BODY, "msfa_indices": [0, 4], "msfa_output_resolution": 4}, [(70, 96)]),
    "one_stage": ({"block_args": BODY, "msfa_indices": [-1], "msfa_output_resolution": 2}, [(128, 96)]),
}


@pytest.fixture(scope="module")
def timm() -> Any:
    """The reference implementation."""
    for package in ("torch", "timm", "torchvision"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    importlib.import_module("golden.reference_builder.torchvision_stubs").declare_missing_operators()
    return importlib.import_module("timm")


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_are_as_timm_has_them(name, framework, timm, tiny_folder, tmp_path):
    import torch

    model_args, sizes = {"stem_size": 8} | SHAPES[name][0], SHAPES[name][1]
    folder = write_random_vision(tmp_path, tiny_folder, model_args)
    network = tower(framework, folder)
    # The builder takes its arguments apart.
    reference = timm.create_model("mobilenetv5_300m_enc", **deepcopy(model_args)).eval()
    reference.load_state_dict({name: torch.from_numpy(array) for name, array in tower_tensors(folder).items()})
    for height, width in sizes:
        pixels = np.random.default_rng(height * width).random((1, 3, height, width), np.float32)
        with torch.no_grad():
            expected = reference(torch.from_numpy(pixels)).numpy()
        assert distance(features(framework, network, pixels), expected) < TOLERANCE, (height, width)


def test_other_output_width(framework, timm, tiny_folder, tmp_path):
    """timm's encoder always has 2048; its classifier's trunk is the same network with a settable width."""
    import torch

    model_args = {"block_args": BODY, "msfa_output_resolution": 2, "stem_size": 8}
    folder = write_random_vision(tmp_path, tiny_folder, model_args, hidden_size=72)
    trunk = importlib.import_module("timm.models.mobilenetv5").MobileNetV5
    reference = trunk(
        **deepcopy(model_args), num_classes=0, num_features=72, pad_type="same", layer_scale_init_value=1e-5
    ).eval()
    reference.load_state_dict({name: torch.from_numpy(array) for name, array in tower_tensors(folder).items()})
    pixels = np.random.default_rng(5).random((1, 3, 96, 64), np.float32)
    with torch.no_grad():
        expected = reference.forward_features(torch.from_numpy(pixels)).numpy()
    assert distance(features(framework, tower(framework, folder), pixels), expected) < TOLERANCE


def test_gradients_reach_the_pixels(frameworks, tiny_folder, golden):
    if "torch" not in frameworks:
        pytest.skip("torch is not installed")
    network = tower(frameworks["torch"], tiny_folder)
    pixels = frameworks["torch"].array(golden["pixel_values"][:1]).requires_grad_()
    network(pixels).square().sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().max() > 0


PUBLISHED = {
    "architecture": "mobilenetv5_300m_enc",
    "hidden_size": 2048,
    "model_args": None,
    "rms_norm_eps": 1e-6,
    "vocab_offset": 262144,
    "vocab_size": 128,
}


def test_published_network_is_timms(timm):
    import torch

    with torch.device("meta"):
        reference = timm.create_model("mobilenetv5_300m_enc")
    config = VisionConfig.from_dict(PUBLISHED, 256, "vision_config")
    prefix = "vision_tower.timm_model."
    ours = {name.removeprefix(prefix): shape for name, shape in vision_manifest(config).items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    for stage, blocks in zip(reference.blocks, config.stages, strict=True):
        for theirs, block in zip(stage, blocks, strict=True):
            assert theirs.has_skip == block.has_skip
            strides = [module.stride[0] for module in theirs.modules() if isinstance(module, torch.nn.Conv2d)]
            if isinstance(block, MobileAttentionConfig):
                assert max(strides) == block.kv_stride
                assert (theirs.attn.num_heads, theirs.attn.key_dim) == (block.num_heads, block.key_dim)
            else:
                assert max(strides) == block.stride
    assert reference.msfa_indices == list(config.msfa_stages)
    assert reference.msfa_output_resolution == config.msfa_output_resolution
