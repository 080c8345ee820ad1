"""Writes GGUF files of Gemma 3n with the gguf package, as llama.cpp's converter has them (conversion/gemma.py)."""

from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import gguf
import gguf.quants
import numpy as np
from checkpoint_files import read_config, read_folder

from g3n_mlx.config.fields import read_json

TEXT = ("model.language_model.", "model.")
Kind = gguf.GGMLQuantizationType


def gguf_tensors(tensors: Mapping[str, np.ndarray], vocab_size: int) -> dict[str, np.ndarray]:
    """Text tensors of the published layout by GGUF's names, float32."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3N, 100)
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {"altup_projections": {}, "altup_unembed_projections": {}}
    for name, array in tensors.items():
        below = next((name.removeprefix(prefix) for prefix in TEXT if name.startswith(prefix)), "")
        if below.startswith(("vision_tower", "audio_tower", "embed_vision", "embed_audio")):
            continue
        array = array.astype(np.float32)
        if (stack := below.split(".")[0]) in stacks:
            stacks[stack][int(below.split(".")[1])] = array
            continue
        if below.startswith("embed_tokens"):
            array = np.concatenate([array, np.zeros((vocab_size - len(array), array.shape[1]), np.float32)])
        base = names.get_name(f"model.{below.removesuffix('.weight')}")
        assert base is not None, name
        found[f"{base}.weight"] = array
    for stack, parts in stacks.items():
        base = names.get_name(f"model.{stack}")
        assert base is not None
        found[f"{base}.weight"] = np.stack([parts[index] for index in sorted(parts)])
    return found


def write_model(
    path: Path,
    source: Path,
    kind: Kind = Kind.F32,
    only: str = "",
    without: str = "",
    architecture: str = "gemma3n",
    **changes: Any,
) -> dict[str, np.ndarray]:
    """The text model of a published folder, its matrices as one type; returns what every tensor stands for.

    only: a part of the names of those that get the type, where not all do. without: a key of the metadata to leave out.
    changes: metadata to write instead, dots as double underlines.
    """
    config = read_config(source)
    text = config.get("text_config", config)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata(text) | tokenizer(source, text["vocab_size"])).items():
        if key != without and key.replace(".", "__") not in changes:
            add(writer, key, value)
    for key, value in changes.items():
        add(writer, key.replace("__", "."), value)
    meaning: dict[str, np.ndarray] = {}
    for name, array in gguf_tensors(read_folder(source), text["vocab_size"]).items():
        # As llama-quantize has it: nothing of AltUp, LAuReL and the PLE inputs' projection.
        left = any(part in name for part in ("altup", "laurel", "per_layer_model_proj", "norm")) or only not in name
        if left or array.ndim != 2 or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            writer.add_tensor(name, array)
            meaning[name] = array
            continue
        raw = quantized(array, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
        meaning[name] = gguf.quants.dequantize(raw, kind)
    finish(writer)
    return meaning


def towers_tensors(source: Path, kind: Kind) -> dict[str, tuple[str, np.ndarray, Kind]]:
    """Tensors of towers and embedders by their published names: GGUF's name, the array and its type.

    As the converter has it, `Gemma3nVisionAudioModel`: blocks of the vision tower are named by itself.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 128)
    found: dict[str, tuple[str, np.ndarray, Kind]] = {}
    for name, array in read_folder(source).items():
        if "language_model" in name:
            continue
        array, stored = array.astype(np.float32), kind
        if (blocks := "model.vision_tower.timm_model.blocks.") in name:
            theirs = name.replace(blocks, "v.blk.")
        else:
            key = name.replace("model.audio_tower.conformer.", "conformer.layers.")
            theirs = names.get_name(key, (".weight", ".bias")) or ""
        if ".subsample_conv_projection." in name and name.endswith(".norm.weight"):  # not in all versions of the map
            theirs = f"a.conv1d.{name.split('.conv_')[1][0]}.norm.weight"
        if theirs == "v.conv_stem.conv.bias":
            array = array.reshape(1, -1, 1, 1)
        if "input_proj" in name:
            stored = Kind.F16
        elif array.ndim == 1 or "stem" in name or ("audio_tower" in name and (".conv" in name or "_conv" in name)):
            stored = Kind.F32
        if array.shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
            stored = Kind.F16
        found[name] = theirs, array, stored
    return found


def write_towers(
    path: Path,
    source: Path,
    kind: Kind = Kind.BF16,
    without: str | tuple[str, ...] = (),
    architecture: str = "clip",
    more: Mapping[str, np.ndarray] | None = None,
    **changes: Any,
) -> dict[str, np.ndarray]:
    """The towers of a published folder as a file of their own; returns what every tensor stands for.

    without: how the published names of tensors to leave out begin. more: further tensors. changes: metadata.
    """
    writer = gguf.GGUFWriter(path, architecture)
    usual = {"clip__vision__projector_type": "gemma3nv", "clip__audio__projector_type": "gemma3na"}
    for key, value in (usual | changes).items():
        add(writer, key.replace("__", "."), value)
    meaning: dict[str, np.ndarray] = {}
    for name, (theirs, array, stored) in towers_tensors(source, kind).items():
        if name.startswith(without):
            continue
        raw = gguf.quants.quantize(array, stored)
        writer.add_tensor(theirs, raw, raw_dtype=stored)
        meaning[name] = gguf.quants.dequantize(raw, stored).reshape(-1)
    for name, array in (more or {}).items():
        writer.add_tensor(name, array)
    finish(writer)
    return meaning


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(array: np.ndarray, kind: Kind) -> np.ndarray:
    """Rows in a type; where the package only reads it, blocks of random codes of the right size."""
    try:
        return gguf.quants.quantize(array, kind)
    except NotImplementedError:
        return random_rows(array.shape[0], array.shape[1], kind, float(np.abs(array).max()))


def random_rows(rows: int, width: int, kind: Kind, size: float = 1.0) -> np.ndarray:
    """Rows of a K type whose bytes are random, but for the float16 numbers: weights are at most about `size`."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(rows + width)
    blocks = draw.integers(0, 256, (rows * width // block_size, block_bytes), np.uint8)
    places = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,), Kind.Q3_K: (108,), Kind.Q2_K: (80, 82)}[kind]
    for place in places:
        halves = (draw.uniform(0.1, 1, len(blocks)) * size / 1024).astype("<f2")
        blocks[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def metadata(text: dict[str, Any]) -> dict[str, Any]:
    """What the converter says of a text_config."""
    cutoffs = [NormalDist().inv_cdf(share) if share else -np.inf for share in text["activation_sparsity_pattern"]]
    values = {
        "block_count": text["num_hidden_layers"],
        "context_length": text["max_position_embeddings"],
        "embedding_length": text["hidden_size"],
        "feed_forward_length": text["intermediate_size"],
        "attention.head_count": text["num_attention_heads"],
        "attention.head_count_kv": text["num_key_value_heads"],
        "rope.freq_base": text["rope_theta"],
        "rope.freq_base_swa": text["rope_local_base_freq"],
        "attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
        "attention.key_length": text["head_dim"],
        "attention.value_length": text["head_dim"],
        "final_logit_softcapping": text["final_logit_softcapping"],
        "attention.sliding_window": text["sliding_window"],
        "altup.active_idx": text["altup_active_idx"],
        "altup.num_inputs": text["altup_num_inputs"],
        "embedding_length_per_layer_input": text["hidden_size_per_layer_input"],
        "attention.shared_kv_layers": text["num_kv_shared_layers"],
        "activation_sparsity_scale": [float(value) for value in cutoffs],
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in text["layer_types"]],
    }
    return {f"gemma3n.{key}": value for key, value in values.items()}


def tokenizer(source: Path, vocab_size: int) -> dict[str, Any]:
    """A SentencePiece model's pieces and scores, as those of tokenizer.json would have been."""
    words = read_json(source / "tokenizer.json")
    added = {token["id"]: token for token in words["added_tokens"]}
    ranks = {"".join(pair): -float(place) for place, pair in reversed(list(enumerate(words["model"]["merges"])))}
    texts = {token_id: text for text, token_id in words["model"]["vocab"].items()}
    tokens, scores, kinds = [], [], []
    for token_id in range(vocab_size):
        text = texts.get(token_id, f"[PAD{token_id}]")
        token = added.get(token_id)
        kind = gguf.TokenType.NORMAL if token_id in texts else gguf.TokenType.UNUSED
        if token is not None:
            kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        elif text.startswith("<0x"):
            kind = gguf.TokenType.BYTE
        tokens.append(text.replace("▁", " ") if kind == gguf.TokenType.USER_DEFINED else text)
        scores.append(-1000.0 if token is not None else ranks.get(text, 0.0))
        kinds.append(int(kind))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": (source / "chat_template.jinja").read_text("utf-8"),
    }


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
