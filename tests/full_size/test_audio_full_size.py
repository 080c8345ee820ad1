"""The published audio tower with random weights against transformers, on one clip of 30 seconds; time and memory.

Each run is a process of its own, so that its peak of memory is its own. Needs transformers, 6 GB of memory and as
much disk; prints what it measures:

    python -m pytest -m slow -s tests/full_size/test_audio_full_size.py
"""

import importlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from g3n_mlx.checkpoint.folder import Checkpoint

FRAMES = 2997  # of 30 seconds
SOUND = 2900  # the rest is padding
TOLERANCE = 1e-4
PUBLISHED: dict[str, Any] = {
    "hidden_size": 1536,
    "input_feat_size": 128,
    "conf_attention_chunk_size": 12,
    "conf_attention_context_left": 13,
    "conf_num_attention_heads": 8,
    "conf_num_hidden_layers": 12,
    "sscp_conv_channel_size": [128, 32],
}
RUNS = [("mlx", "float32"), ("mlx", "bfloat16"), ("torch", "float32"), ("torch", "bfloat16")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, the clip, and transformers' encodings of it in float32."""
    from random_audio import write_audio

    folder = write_audio(tmp_path_factory.mktemp("audio"), dtype=ml_dtypes.bfloat16, **PUBLISHED)
    noise = np.random.default_rng(1).standard_normal((1, FRAMES, 128)).astype(np.float32)
    mask = np.arange(FRAMES)[None] < SOUND
    np.savez(folder / "clip.npz", frames=np.where(mask[..., None], 2 * noise - 3, np.log(np.float32(1e-5))), mask=mask)
    report("transformers", "float32", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("runner", "dtype"), RUNS)
def test_published_size(folder: Path, runner: str, dtype: str) -> None:
    pytest.importorskip({"mlx": "mlx.core", "torch": "torch"}[runner])
    pytest.importorskip("transformers")
    report(runner, dtype, folder)
    reference, ours = (np.load(folder / f"{name}.npz") for name in ("transformers-float32", f"{runner}-{dtype}"))
    difference = np.abs(ours["encodings"] - reference["encodings"]).max() / np.abs(reference["encodings"]).max()
    print(f"  largest difference from transformers in float32: {difference:.1e} of the largest value")
    np.testing.assert_array_equal(ours["mask"], reference["mask"])
    assert ours["encodings"].shape == (1, 188, 1536)
    if dtype == "float32":
        assert difference < TOLERANCE


def report(runner: str, dtype: str, folder: Path) -> None:
    """Runs this file as a program, and prints what it measured."""
    command = [sys.executable, __file__, runner, dtype, str(folder)]
    every_core = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=every_core)
    measured = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{runner} {dtype}:", ", ".join(f"{name} {value:.2f}" for name, value in measured.items()))


def main(runner: str, dtype: str, folder: Path) -> None:
    """Encodes the clip twice; the second time is the one reported."""
    with np.load(folder / "clip.npz") as clip:
        frames, mask = clip["frames"], clip["mask"]
    started = time.perf_counter()
    encode = transformers_encoder(folder) if runner == "transformers" else our_encoder(runner, dtype, folder)
    loaded = time.perf_counter()
    held = peak_memory()
    encodings, valid = encode(frames, mask)
    first, before = time.perf_counter(), time.process_time()
    encode(frames, mask)
    second, after = time.perf_counter(), time.process_time()
    np.savez(folder / f"{runner}-{dtype}.npz", encodings=encodings, mask=valid)
    measured = {
        "load s": loaded - started,
        "first clip s": first - loaded,
        "second clip s": second - first,
        "second clip CPU s": after - before,
        "peak GB after load": held,
        "peak GB": peak_memory(),
    }
    print(json.dumps(measured))


def peak_memory() -> float:
    """Gigabytes that the process has had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def our_encoder(runner: str, dtype: str, folder: Path) -> Any:
    """(frames, mask) -> encodings in float32 and mask, by one backend on the CPU."""
    audio, device, weights = (
        importlib.import_module(f"g3n_mlx.backends.{runner}.{name}") for name in ("audio", "device", "weights")
    )
    place = device.device_of("cpu")
    device.claim(place)
    checkpoint = Checkpoint.open(folder)
    placement = weights.Placement(device.dtype_of(dtype, place, False), place)
    below = weights.Weights(checkpoint, placement).at("audio_tower")
    tower = audio.AudioTower(checkpoint.config.audio, below)
    if runner == "mlx":
        import mlx.core as mx

        def encode_mlx(frames: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            encodings, valid = tower(mx.array(frames), mx.array(mask))
            return np.array(encodings.astype(mx.float32)), np.array(valid)

        return encode_mlx
    import torch

    def encode_torch(frames: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            encodings, valid = tower(torch.from_numpy(frames), torch.from_numpy(mask))
        return encodings.float().numpy(), valid.numpy()

    return encode_torch


def transformers_encoder(folder: Path) -> Any:
    """The same by transformers, in float32."""
    sys.modules["torchvision"] = None  # pyright: ignore[reportArgumentType] (wanted for pictures only)
    import torch
    from safetensors.torch import load_file
    from transformers import Gemma3nAudioConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioEncoder

    raw = json.loads((folder / "config.json").read_text())["audio_config"]
    encoder = Gemma3nAudioEncoder(Gemma3nAudioConfig(**raw))
    prefix = "model.audio_tower."
    tensors = load_file(folder / "model.safetensors")
    encoder.load_state_dict(
        {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items() if name.startswith(prefix)}
    )

    def encode(frames: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            output = encoder(torch.from_numpy(frames), ~torch.from_numpy(mask))
        return output.last_hidden_state.numpy(), ~output.audio_mel_mask.numpy()

    return encode


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
