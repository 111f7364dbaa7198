"""From a path or hub name to a model: the checkpoint's `config.json` says which class reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from omnimem_train.errors import UserError, nearest
from omnimem_train.models.interface import StreamingModel
from omnimem_train.models.quantised import KINDS, check_available, quantise

# model_type of config.json -> "module:class"; imported when needed.
MODELS: dict[str, str] = {
    "qwen2_5_omni": "omnimem_train.models.qwen2_5_omni:Qwen2_5OmniStreaming",
    "qwen2_5_omni_thinker": "omnimem_train.models.qwen2_5_omni:Qwen2_5OmniStreaming",
    # What published video-SALMONN 2+ folders say; a stock folder of these types is refused: it has no audio part.
    "qwen2_5_vl": "omnimem_train.models.salmonn.stream_model:VideoSalmonn2Streaming",
    "qwen3_vl": "omnimem_train.models.salmonn.stream_model:VideoSalmonn2Streaming",
    "video_salmonn2": "omnimem_train.models.salmonn.stream_model:VideoSalmonn2Streaming",
}

VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_KERNELS = ("sdpa", "split", "eager")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how to hold it.

    Attributes:
        path: checkpoint folder, or a name on the Hugging Face hub ("Qwen/Qwen2.5-Omni-7B").
        dtype: "auto" (as stored), "float32", "bfloat16", "float16" or "float64".
        quantization: "none", or "nf4": the matrices of the decoder's layers in 4 bits (bitsandbytes, QLoRA's NF4 with
            double quantisation), unpacked to `dtype` for each product. An adapter trained so fits the checkpoint in
            either form.
        device: "auto" (the first accelerator there is, else the CPU) or a torch device.
        attention: kernel of the decoder's attention: "sdpa"; "split" (memory and chunk one after the other, through
            cuDNN on Hopper GPUs); or "eager" as a reference.
        adapter: folder of a PEFT adapter to put on the model, or None.
        graphs: on an NVIDIA GPU, record the launches of chunks that repeat (CUDA graphs) and replay them: less work for
            the host, more memory. It pays where streams share budgets and chunk lengths. See
            `omnimem_train.chunk_graphs`.
    """

    path: str = ""
    dtype: str = "auto"
    quantization: str = "none"
    device: str = "auto"
    attention: str = "sdpa"
    adapter: str | None = None
    graphs: bool = False

    def __post_init__(self) -> None:
        choices = (("dtype", _DTYPES), ("attention", _KERNELS), ("quantization", KINDS))
        for name, known in choices:
            value = getattr(self, name)
            if value not in known:
                raise UserError(
                    f"model.{name} is {value!r}{nearest(str(value), known)}",
                    remedy=f"choose one of: {', '.join(known)}",
                )


def load_model(
    path: str | Path,
    *,
    dtype: str = "auto",
    quantization: str = "none",
    device: str | torch.device = "auto",
    attention: str = "sdpa",
    adapter: str | Path | None = None,
    graphs: bool = False,
) -> StreamingModel:
    """The streaming model of a checkpoint, in evaluation mode, all its weights frozen.

    The arguments are the fields of `ModelConfig`.

    Raises:
        UserError: no such folder, no `config.json`, tokenizer or weights in it, a kind of model that is not known here,
            or no bitsandbytes for a 4-bit base.
    """
    held = None if adapter is None else str(adapter)
    config = ModelConfig(str(path), dtype, quantization, str(device), attention, held, graphs)
    target = model_class(config.path)
    where = pick_device(config.device)
    packs = config.quantization != "none"
    if packs:
        check_available()
    check_tokenizer(config.path)
    first = torch.device("cpu") if packs else where  # the device never holds what is to be packed
    try:
        model: StreamingModel = target.from_checkpoint(config.path, dtype=dtype, device=first, attention=attention)
    except UserError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise many kinds at a damaged file
        raise UserError(
            f"the checkpoint {config.path} cannot be loaded",
            cause=(f"{type(error).__name__}: {error}".strip().splitlines())[0],
            remedy="fetch the checkpoint again; its config.json, weights and tokenizer must belong together",
        ) from error
    if packs:
        quantise(model, where)
    model.graphs = config.graphs and where.type == "cuda"
    if config.adapter is not None:
        from omnimem_train.models.importance import load_importance_head
        from omnimem_train.models.lora import load_adapter  # peft only where an adapter is

        load_adapter(model, config.adapter)
        load_importance_head(model, config.adapter)
    return model


def load(config: ModelConfig) -> StreamingModel:
    """`load_model` with the fields of `config`."""
    return load_model(**vars(config))


def model_class(path: str) -> Any:
    """The class that reads the checkpoint at `path`.

    Raises:
        UserError: see `load_model`.
    """
    kind = read_json(path, "config.json").get("model_type")
    if not isinstance(kind, str) or kind not in MODELS:
        raise UserError(
            f"{path} holds a model of type {kind!r}{nearest(str(kind), MODELS)}",
            cause="only models whose encoders and decoder are known here can stream",
            remedy=f"use a checkpoint of one of these types: {', '.join(MODELS)}",
        )
    module, name = MODELS[kind].split(":")
    return getattr(import_module(module), name)


def check_tokenizer(path: str) -> None:
    """Raises UserError unless the checkpoint at `path` has a vocabulary. transformers would make an empty tokenizer
    from the other files, which turns every text into no tokens."""
    if not any(all(find_file(path, name) for name in names) for names in VOCABULARIES):
        raise UserError(
            f"{path} has no tokenizer.json, nor vocab.json with merges.txt",
            cause="without one of them there is no vocabulary, and text cannot be read",
            remedy="complete the download, or copy these files from the checkpoint the model was made from",
        )


def pick_device(device: str) -> torch.device:
    """A torch device from its name; "auto" is the current accelerator if there is one.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device(found.type, torch.accelerator.current_device_index()) if found else torch.device("cpu")
    try:
        found = torch.zeros(0, device=device).device
        if found.type == "meta":
            raise RuntimeError("meta tensors hold no numbers")
        return found
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"cannot use the device {device!r}", cause=first_line, remedy="try 'auto' or 'cpu'") from error


def read_json(path: str | Path, name: str, *, required: bool = True) -> dict[str, Any]:
    """The JSON file `name` of a checkpoint folder or hub repository; {} when it is absent and not `required`.

    Raises:
        UserError: the checkpoint or the file is absent, or the file is no JSON object.
    """
    file = find_file(path, name)
    if file is None:
        if required:
            raise UserError(
                f"{path} has no {name}",
                cause="it is not a checkpoint in the Hugging Face layout, or not complete",
                remedy="give the folder that save_pretrained wrote, or a name on the hub",
            )
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}", cause=str(error), remedy="fetch the checkpoint again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object", remedy="fetch the checkpoint again")
    return content


def find_file(path: str | Path, name: str) -> Path | None:
    """Where a file of a checkpoint is; fetched from the hub if need be; None when the checkpoint has no such file.

    Raises:
        UserError: there is no such folder and no such repository, or the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    parts = str(path).split("/")
    if folder.exists() or len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise UserError(
            f"there is no model folder {str(path)!r}",
            remedy="check the path, or give a hub name like Qwen/Qwen2.5-Omni-7B",
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(path), name))
    except LocalEntryNotFoundError as error:
        raise _unreachable(path, error) from error
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise _unreachable(path, error) from error


def _unreachable(path: str | Path, error: Exception) -> UserError:
    return UserError(
        f"there is no folder {str(path)!r}, and the hub gave no such model",
        cause=(str(error).strip().splitlines() or [type(error).__name__])[0],
        remedy="check the path or the hub name; without a network, download the checkpoint first",
    )
