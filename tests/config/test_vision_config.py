"""The vision tower's shape: the published network, what `model_args` may change about it, and what it may not say."""

from math import prod
from typing import Any

import pytest
from checkpoint_files import read_config, read_folder
from random_vision import er, mqa, uir

from g3n_mlx.config.vision import (
    EdgeResidualConfig,
    MobileAttentionConfig,
    UniversalInvertedResidualConfig,
    VisionConfig,
    same_padding,
    vision_manifest,
)

STAGES = [[er(16, 3, 2)], [uir(24, 3, 5, stride=2), uir(24, 0, 0)], [uir(32, 5, 0, stride=2)]]


def config(model_args: Any, soft_tokens: int = 256, **changes: Any) -> VisionConfig:
    raw = {"hidden_size": 2048, "vocab_size": 128, "vocab_offset": 262144, "rms_norm_eps": 1e-6}
    return VisionConfig.from_dict(raw | {"model_args": model_args} | changes, soft_tokens, "config.json, vision_config")


def blocks(*stages: list[dict[str, Any]]) -> VisionConfig:
    return config({"block_args": list(stages)})


@pytest.mark.parametrize("model_args", [None, {}])
def test_published_network(model_args):
    published = config(model_args)
    assert [len(stage) for stage in published.stages] == [3, 5, 37, 39]
    assert published.msfa_stages == (3, 4)
    assert published.stages[0][0] == EdgeResidualConfig(64, 256, 128, 3, 1, 2, has_skip=False)
    assert published.stages[1][0] == UniversalInvertedResidualConfig(
        128, 768, 256, 3, 5, 0, 2, has_skip=False, has_layer_scale=True
    )
    assert published.stages[2][9] == MobileAttentionConfig(640, 640, 12, 64, 64, 2, 3, has_skip=True)
    assert published.stages[3][37] == MobileAttentionConfig(1280, 1280, 16, 96, 96, 1, 3, has_skip=True)
    # 14 layers shrink keys and values each; the number of parameters is timm's.
    manifest = vision_manifest(published)
    assert sum("down_conv" in name for name in manifest) == 28
    assert sum(map(prod, manifest.values())) == 294_126_912


def test_model_args_change_what_they_name():
    changed = config({"msfa_output_resolution": 8}, 64)
    assert changed.stages == config(None).stages
    assert changed.msfa_output_resolution == 8
    assert config({"stem_size": 24}).stages[0][0].in_channels == 24


def test_manifest_is_what_the_tiny_checkpoint_holds(tiny_folder):
    raw = read_config(tiny_folder)
    vision = VisionConfig.from_dict(raw["vision_config"], raw["vision_soft_tokens_per_image"], "config.json")
    stored = {
        name.removeprefix("model."): array.shape
        for name, array in read_folder(tiny_folder).items()
        if "vision_tower" in name
    }
    assert vision_manifest(vision) == stored


@pytest.mark.parametrize(("asked", "rounded"), [(1, 8), (11, 16), (12, 16), (20, 24), (19, 24), (35, 32), (36, 40)])
def test_channels_are_multiples_of_8_and_at_least_nine_tenths(asked, rounded):
    (first, *_), *_ = blocks([er(asked, 3, 2)]).stages
    assert first.out_channels == rounded


def test_expansion_is_of_the_channels_that_come_in():
    (edge, second), (inverted,) = blocks(
        [er(24, 3, 2, 4.0), er(24, 3, 1, 1.5)], [uir(40, 3, 0, stride=2, ratio=2.7)]
    ).stages
    assert [edge.mid_channels, second.mid_channels, inverted.mid_channels] == [256, 40, 64]


def test_skip_needs_equal_channels_and_no_stride():
    (first, same, wider), (halved, attention, other) = blocks(
        [er(64, 3, 2), er(64, 3), er(24, 3)], [uir(24, 3, 0, stride=2), mqa(24, 2, 8), mqa(32, 2, 8)]
    ).stages
    assert [block.has_skip for block in (first, same, wider)] == [False, True, False]
    assert [block.has_skip for block in (halved, attention, other)] == [False, True, False]


def test_only_the_first_block_of_a_stage_strides():
    (first, second), *_ = blocks([uir(16, 3, 3, stride=2), uir(16, 3, 3, stride=2)]).stages
    assert [first.stride, second.stride, second.has_skip] == [2, 1, True]


@pytest.mark.parametrize(
    ("kernels", "strides"),
    [((3, 5, 7), (1, 2, 1)), ((0, 5, 7), (1, 2, 1)), ((3, 0, 7), (2, 2, 1)), ((0, 0, 7), (2, 2, 2))],
)
def test_which_depthwise_kernel_strides(kernels, strides):
    ((block,),) = blocks([uir(16, *kernels, stride=2)]).stages
    used = [stride for kernel, stride in zip(kernels, block.strides, strict=True) if kernel]
    assert used == [stride for kernel, stride in zip(kernels, strides, strict=True) if kernel]


@pytest.mark.parametrize(
    ("axis", "padding"),
    [
        ((48, 3, 1), (1, 1)),
        ((48, 3, 2), (0, 1)),
        ((47, 3, 2), (1, 1)),
        ((48, 5, 2), (1, 2)),
        ((48, 2, 1), (0, 1)),
        ((48, 1, 2), (0, 0)),
        ((1, 3, 4), (1, 1)),
    ],
)
def test_same_padding(axis, padding):
    assert same_padding(*axis) == padding


BAD = {
    "not an object": (7, "model_args is 7, expected an object or null"),
    "unknown key": ({"pad_type": ""}, r"model_args has \['pad_type'\], only \["),
    "no stages": ({"block_args": []}, r"block_args is \[\], expected a list of 1 to 4 stages"),
    "a fifth stage": ({"block_args": [[er(16, 3, 2)]] * 5}, "expected a list of 1 to 4 stages"),
    "an empty stage": ({"block_args": [[er(16, 3, 2)], []]}, r"block_args\[1\] is \[\], expected a list of blocks"),
    "a stage in words": ({"block_args": [["er_r1_k3_s2_e4_c16"]]}, r"block_args\[0\] is \['er_r1_k3_s2_e4_c16'\]"),
    "no type": ({"block_args": [[{"stride": 2}]]}, r"block_args\[0\]\[0\]: the key 'block_type' is missing"),
    "another type": (
        {"block_args": [[er(16, 3, 2, block_type="ir")]]},
        r"block_args\[0\]\[0\]: block_type is 'ir', only 'er', 'uir' and 'mqa' are supported",
    ),
    "a type that is none": ({"block_args": [[er(16, 3, 2, block_type=["er"])]]}, r"block_type is \['er'\], only"),
    "squeeze and excitation": ({"block_args": [[er(16, 3, 2, se_ratio=0.25)]]}, r"se_ratio is 0.25, only 0 is"),
    "an activation": ({"block_args": [[uir(16, 3, 3, act_layer="relu")]]}, "act_layer is 'relu', only None is"),
    "groups": ({"block_args": [[uir(16, 3, 3, group_size=4)]]}, "group_size is 4, only 1 is"),
    "an unknown field": (
        {"block_args": [[mqa(16, 2, 8, use_cpe=True)]]},
        "the key 'use_cpe' is not supported for 'mqa'",
    ),
    "two kernels": ({"block_args": [[er(16, 3, 2, exp_kernel_size=[3, 5])]]}, r"exp_kernel_size is \[3, 5\]"),
    "a stride of 3": ({"block_args": [[er(16, 3, 3)]]}, "stride is 3, expected 2"),
    "a later stride of 3": ({"block_args": [[er(16, 3, 2), er(16, 3, 3)]]}, "stride is 3, expected 1 or 2"),
    "a stage that shrinks nothing": ({"block_args": [[er(16, 3, 1)]]}, "stride is 1, expected 2"),
    "attention that strides": ({"block_args": [[er(16, 3, 2), mqa(16, 2, 8, stride=2)]]}, "stride is 2, expected 1"),
    "attention in front": ({"block_args": [[mqa(16, 2, 8)]]}, "block_type is 'mqa', expected 'er' or 'uir'"),
    "nothing to stride": ({"block_args": [[uir(16, 0, 0, stride=2)]]}, "has no depthwise kernel that could stride"),
    "no expansion": ({"block_args": [[er(16, 3, 2, ratio=0)]]}, "exp_ratio is 0, expected a number above 0"),
    "a skip in words": ({"block_args": [[er(16, 3, 2, noskip="no")]]}, "noskip is 'no', only False is supported"),
    "no skip": ({"block_args": [[er(16, 3, 2), er(16, 3, noskip=True)]]}, "noskip is True, only False is supported"),
    "an expansion of other channels": ({"block_args": [[er(16, 3, 2, force_in_chs=8)]]}, "force_in_chs is 8, only 0"),
    "no stages fused": ({"msfa_indices": []}, r"msfa_indices is \[\], expected a list of integers"),
    "a stage that is not": ({"msfa_indices": [5]}, r"msfa_indices is \[5\], but there are 5 resolutions"),
    "a stage fused twice": ({"msfa_indices": [-1, 4]}, r"msfa_indices is \[-1, 4\], which names a resolution twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_with_the_place_and_the_reason(name):
    model_args, message = BAD[name]
    with pytest.raises(ValueError, match=message) as raised:
        config(model_args)
    assert str(raised.value).startswith("config.json, vision_config")


def test_soft_tokens_are_the_places_of_the_features():
    with pytest.raises(ValueError, match=r"resolution is 16, which makes 256 soft tokens, but .* is 188"):
        config(None, 188)


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match="architecture is 'vit', only 'mobilenetv5_300m_enc' is supported"):
        config(None, architecture="vit")
