"""`load`: from a folder or hub id to a model that answers. The only importer of the backends."""

import importlib
import importlib.util
import logging
import platform
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

from g3n_mlx.checkpoint.ahead import read_ahead
from g3n_mlx.checkpoint.finite import not_finite
from g3n_mlx.checkpoint.folder import Checkpoint
from g3n_mlx.checkpoint.registry import note_use
from g3n_mlx.config.fields import read_json
from g3n_mlx.convert import cached_conversion, plan_for, resolve
from g3n_mlx.engine.runner import Runner, model_thread
from g3n_mlx.failures import BadValue, Error, FileProblem, MissingPackage
from g3n_mlx.installation import install_command
from g3n_mlx.interface import Model
from g3n_mlx.matformer.adapted import AdapterLike, changes_of_slice, named_adapters, open_adapted, with_changes
from g3n_mlx.memory import available_bytes
from g3n_mlx.model import ACTIVATION_BYTES, Gemma3n
from g3n_mlx.prompt.own_template import OwnTemplate, chat_template_note
from g3n_mlx.prompt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CHAT_TEMPLATES = ("gemma", "own")
ACTIVATIONS = ("exact", "int8")
PACKAGES = {"mlx": "mlx.core", "torch": "torch"}


def load(
    path_or_id: str | Path,
    *,
    backend: str = "auto",
    matformer: str | None = None,
    matformer_config: str | Path | None = None,
    q_bits: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    chat_template: str = "gemma",
    activations: str = "exact",
    adapter: AdapterLike | None = None,
) -> Gemma3n:
    """Loads a Gemma 3n checkpoint of any layout from a folder, a GGUF file, the Hugging Face hub or by its name.

    The name is that of a conversion's folder, wherever that lies (`g3n models` lists them). A GGUF file, with the
    towers of the only mmproj file beside it, or a model of mistral.rs (UQFF: its folder, hub id or file), is converted
    into the user's cache folder once. A GGUF file of the hub is named as owner/name/FILE.gguf.

    backend: "mlx", "torch", or "auto": MLX on Apple Silicon, elsewhere PyTorch, else whichever is installed.
    matformer: a slice by name or short form ("e2.49b-block"), from the published table or `matformer_config`, a CSV.
    q_bits: quantizes an unquantized checkpoint once into the user's cache folder and opens that from then on.
    dtype: of the activations, "bfloat16" or "float32". device: "cpu", "cuda", "cuda:N"; None is the backend's best.
    chat_template: "gemma" makes prompts by Gemma 3n's template, "own" by the checkpoint's; a warning says where they
    differ.
    activations: "int8" rounds what a prompt's products with quantized weights take, in groups, to 8 bits: a faster
    approximation on a CPU (docs/performance.md).
    adapter: a LoRA or DoRA adapter of PEFT, mlx-lm or mlx-vlm, as a folder or hub id; or several, {"a": 1.0, "b": 0.5}
    with their weights, each over what those before it make. Dense weights are merged, quantized ones stay as they are.
    Raises ImportError without a backend, FileNotFoundError, ValueError and the hub's errors, each in one sentence.
    """
    for what, value in (("backend", backend), ("matformer", matformer), ("dtype", dtype), ("device", device)):
        if value is not None and not isinstance(value, str):
            raise BadValue(f"{what} is {value!r}, expected a string")
    for what, value, known in (
        ("chat_template", chat_template, CHAT_TEMPLATES),
        ("activations", activations, ACTIVATIONS),
    ):
        if value not in known:
            raise BadValue(f"{what} is {value!r}, expected one of {', '.join(known)}")
    backend = chosen_backend(backend)
    devices = importlib.import_module(f"g3n_mlx.backends.{backend}.device")
    place = devices.device_of(device)
    if matformer is None and matformer_config is not None:
        raise BadValue("matformer_config was given without matformer: name the slice to take from it")
    folder = resolve(path_or_id, revision)
    named = Path(path_or_id).expanduser()
    name = named.resolve().name if named.is_dir() else str(path_or_id).rstrip("/")
    plan = None if matformer is None else plan_for(folder, matformer, matformer_config)
    adapters = named_adapters(adapter)
    if q_bits is None:
        read_ahead(folder)
        checkpoint = open_adapted(folder, plan, adapters)
    else:
        changes = changes_of_slice(folder, plan, adapters)
        folder = cached_conversion(folder, q_bits=q_bits, plan=plan)
        read_ahead(folder)
        checkpoint = with_changes(Checkpoint.open(folder), changes)
    activations_dtype = devices.dtype_of(dtype, place, bool(checkpoint.quantizations))
    dtype_name = devices.dtype_name(activations_dtype)
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.check_ids(checkpoint.config.text.vocab_size)
    own_template = _own_template(checkpoint) if chat_template == "own" else None
    if chat_template == "gemma" and (note := chat_template_note(folder, checkpoint.config.media_kinds)) is not None:
        logger.warning("%s", note)
    note_use(folder)
    return Gemma3n(
        _runner(checkpoint, name, backend, place, activations_dtype, activations),
        checkpoint,
        tokenizer,
        name=name,
        slice_name=None if plan is None else plan.slice_name,
        backend=backend,
        device=devices.name(place),
        dtype=dtype_name,
        generation_config=_generation_config(folder),
        own_template=own_template,
        adapters=tuple(adapters),
    )


def load_view(like: Gemma3n, checkpoint: Checkpoint, device: str | None = None, activations: str = "exact") -> Gemma3n:
    """A model over another view of a loaded model's checkpoint, such as one with weights at other bits.

    It has the same tokenizer, backend and dtype. device, activations: those that the model was loaded with.
    """
    devices = importlib.import_module(f"g3n_mlx.backends.{like.backend}.device")
    place = devices.device_of(device)
    activations_dtype = devices.dtype_of(like.dtype, place, bool(checkpoint.quantizations))
    return Gemma3n(
        _runner(checkpoint, like.name, like.backend, place, activations_dtype, activations),
        checkpoint,
        like.tokenizer,
        name=like.name,
        slice_name=like.slice_name,
        backend=like.backend,
        device=devices.name(place),
        dtype=like.dtype,
        generation_config=_generation_config(checkpoint.folder),
    )


def _runner(
    checkpoint: Checkpoint, name: str, backend: str, place: Any, activations_dtype: Any, activations: str
) -> Runner:
    """Builds the network of a checkpoint, in the thread that it then lives in."""
    devices = importlib.import_module(f"g3n_mlx.backends.{backend}.device")
    model_file = importlib.import_module(f"g3n_mlx.backends.{backend}.model")
    thread = model_thread(backend, devices.leave)
    dtype_name = devices.dtype_name(activations_dtype)
    defect = cache(partial(_defect, checkpoint, dtype_name))

    def built() -> Model:
        devices.claim(place, checkpoint.nbytes_in_memory(ACTIVATION_BYTES[dtype_name]))
        model: Model = model_file.Gemma3nModel(checkpoint, activations_dtype, place)
        if not model.has_finite_head():
            raise defect()
        if activations == "int8":
            devices.round_activations(model)
        return model

    return Runner(thread.call(built), thread, name, defect)


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def import_backend(name: str) -> None:
    """Imports what `load` would; raises ImportError when it is absent."""
    backend = chosen_backend(name)
    for module in ("device", "model"):
        importlib.import_module(f"g3n_mlx.backends.{backend}.{module}")


def _own_template(checkpoint: Checkpoint) -> OwnTemplate:
    own = OwnTemplate.from_folder(checkpoint.folder)
    if own is None:
        raise BadValue(f"{checkpoint.folder} has no chat template of its own: load it without chat_template='own'")
    return own


def _defect(checkpoint: Checkpoint, dtype: str) -> Error:
    """Why a model's numbers are not finite, once that has been seen; reads all weights."""
    found = not_finite(checkpoint)
    if found is not None:
        return FileProblem(
            f"{checkpoint.folder.name}: {found} holds NaN or infinity: download it again, or take a checkpoint from "
            "before its training diverged"
        )
    wider = "; try the dtype float32" if dtype != "float32" else ""
    return FileProblem(
        f"{checkpoint.folder.name}: every weight is finite, but the activations overflow in {dtype}{wider}"
    )


def free_bytes(backend: str, device: str | None) -> int:
    """Memory that is free where a model would be: on the device of a name, or the system's own.

    Raises ImportError or ValueError where there is no such backend or device.
    """
    devices = importlib.import_module(f"g3n_mlx.backends.{chosen_backend(backend)}.device")
    free = devices.free_bytes(devices.device_of(device))
    return available_bytes() if free is None else free


def chosen_backend(name: str) -> str:
    """The backend to use; raises ImportError, saying what to install, when it or both are absent."""
    if name not in ("auto", *PACKAGES):
        raise BadValue(f"backend {name!r} does not exist: expected 'auto', 'mlx' or 'torch'")
    found = [backend for backend in PACKAGES if _installed(backend)]
    if name == "auto":
        apple = sys.platform == "darwin" and platform.machine() == "arm64"
        preferred = "mlx" if apple else "torch"
        if not found:
            raise MissingPackage(f"neither MLX nor PyTorch is installed: {install_command(preferred)}")
        return preferred if preferred in found else found[0]
    if name not in found:
        raise MissingPackage(f"the {name} backend is not installed: {install_command(name)}")
    return name


def _installed(backend: str) -> bool:
    try:
        return importlib.util.find_spec(PACKAGES[backend]) is not None
    except ModuleNotFoundError:  # the package that would hold it is absent
        return False
