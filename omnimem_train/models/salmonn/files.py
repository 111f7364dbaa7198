"""Published key names, and the checks around loading and saving."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from omnimem_train.errors import UserError

OLD_KEYS = {
    r"^visual\.": "model.visual.",
    r"^audio\.": "model.audio.",
    r"^model\.(?=embed_tokens|layers|norm)": "model.language_model.",
}
"""Published Qwen2.5-VL keys -> ours, as regular expressions. Keys in the newer layout pass unchanged."""
LISTED = 12


def published_key(key: str, backbone: str) -> str:
    """Our parameter name as the published checkpoints write it."""
    if backbone != "qwen2_5_vl":
        return key
    return re.sub(r"^model\.(language_model\.)?", lambda m: "model." if m[1] else "", key)


def our_key(key: str) -> str:
    """A published parameter name as ours."""
    for old, new in OLD_KEYS.items():
        key, changed = re.subn(old, new, key)
        if changed:
            break
    return key


def check_loaded(source: str, info: Mapping[str, Any], *, tied: bool) -> None:
    """Raises `UserError` with the keys that were missing, surplus or of another size.

    Args:
        source: the folder, for the message.
        info: `output_loading_info` of transformers.
        tied: the output matrix is the embedding matrix and may be absent.
    """
    missing = {k for k in info["missing_keys"] if not (tied and k == "lm_head.weight")}
    sizes = [f"{k}: {tuple(found)} in the file, {tuple(ours)} here" for k, found, ours in info["mismatched_keys"]]
    parts = {"missing": missing, "surplus": info["unexpected_keys"], "of another size": sizes}
    found = [f"{len(keys)} {what}: {listed(keys)}" for what, keys in parts.items() if keys]
    if found:
        raise UserError(
            f"{source}: the weights do not fit config.json; {'; '.join(found)}",
            "the folder is incomplete, or weights and configuration are of two models",
            "download the checkpoint again, or check audio_config and qformer_config",
        )


def listed(keys: Iterable[str]) -> str:
    """The first keys in order, and how many more."""
    ordered = sorted(keys)
    more = f" and {len(ordered) - LISTED} more" if len(ordered) > LISTED else ""
    return ", ".join(ordered[:LISTED]) + more


def save_published(model: Any, save: Callable[..., None], folder: Any, **kwargs: Any) -> None:
    """Saves in the published layout: old key names, and the backbone's own `config.json` with `audio_config`."""
    state: Mapping[str, Tensor] = kwargs.pop("state_dict", None) or model.state_dict()
    if model.config.tie_word_embeddings:
        state = {k: v for k, v in state.items() if k != "lm_head.weight"}
    backbone = model.config.backbone
    renamed = {published_key(k, backbone): v for k, v in state.items()}
    save(folder, state_dict=renamed, save_original_format=False, **kwargs)
    if kwargs.get("is_main_process", True):
        config = json.dumps(model.config.published(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / "config.json").write_text(config, encoding="utf-8")
