"""Qwen2.5-Omni (arXiv 2503.20215) behind the interface: the stock thinker, driven layer by layer.

Only the thinker is loaded, from a thinker checkpoint or out of a full Omni checkpoint. Its parts sit at different names
in different versions of transformers (5.23: `model.language_model`, `model.visual`; 5.10 to 5.17: `model`, `visual`);
`Parts` finds them by what is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from omnimem_train.errors import UserError
from omnimem_train.models.checks import check_options, check_text, paired_window_s
from omnimem_train.models.decoder import StockDecoder
from omnimem_train.models.encoding import OmniEncoder
from omnimem_train.models.interface import (
    MediaEncoder,
    MediaInfo,
    RenderedTurn,
    StreamingModel,
    Turn,
)
from omnimem_train.models.layout import BLOCK_POSITIONS, POSITIONS_PER_S
from omnimem_train.models.loading import find_file, read_json
from omnimem_train.models.preprocess import Settings, peak_log_mel, read_settings, resize, smart_resize
from omnimem_train.models.segments import NAME as SEGMENTS

WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class Parts:
    """The parts of a thinker, whichever version of transformers built it.

    Attributes:
        text: decoder with `embed_tokens`, `layers`, `norm`, `rotary_emb`.
        visual, audio: the two towers.
    """

    text: nn.Module
    visual: nn.Module
    audio: nn.Module

    @classmethod
    def of(cls, thinker: nn.Module) -> Parts:
        """Find the parts of `thinker`."""
        inner: Any = thinker.model
        if hasattr(inner, "language_model"):
            return cls(inner.language_model, inner.visual, inner.audio_tower)
        outer: Any = thinker
        return cls(inner, outer.visual, outer.audio_tower)


class Qwen2_5OmniStreaming(StockDecoder, StreamingModel):
    """A Qwen2.5-Omni thinker that can be run on a stream.

    Args:
        module: the stock thinker.
        tokenizer: its tokenizer.
        preprocessing: the checkpoint's preprocessing.
        attention: kernel of the decoder's attention, one of `omnimem_train.models.attention.KERNELS`.

    Raises:
        UserError: the decoder uses a sliding window, or the model numbers time otherwise than streams are laid out.
    """

    adapter_layouts = ("thinker", "omni")

    def __init__(self, module: nn.Module, tokenizer: Any, preprocessing: Settings, attention: str = "sdpa") -> None:
        self.parts = Parts.of(module)
        super().__init__(module, self.parts.text, cast(nn.Module, module.lm_head), attention)
        for tower in (self.parts.visual, self.parts.audio):
            # through the configuration: `set_attn_implementation` takes a name with "flash" in it for a kernel to load
            cast(Any, tower).config._attn_implementation = SEGMENTS
        self.tokenizer, self.preprocessing = tokenizer, preprocessing
        self.sampling_rate = preprocessing.sampling_rate
        self.eos_ids = tuple(self.token_ids(["<|im_end|>", "<|endoftext|>"]))
        self._control_tokens = [str(token) for token in tokenizer.all_special_tokens]
        config: Any = module.config
        rate, block_s = config.position_id_per_seconds, config.seconds_per_chunk
        if (rate, rate * block_s) != (POSITIONS_PER_S, BLOCK_POSITIONS):
            raise UserError(
                f"the checkpoint has {rate} positions a second in blocks of {block_s} s",
                cause="streams are laid out for 25 a second in blocks of 2 s, as all published checkpoints are",
                remedy="use a published checkpoint, or one fine-tuned from it",
            )

    @classmethod
    def from_checkpoint(cls, path: str, *, dtype: str, device: torch.device, attention: str) -> Qwen2_5OmniStreaming:
        """Load the thinker of the checkpoint at `path`, frozen, in evaluation mode. Arguments as in `load_model`.

        Raises:
            UserError: weights are absent or do not fit the configuration.
        """
        if not any(find_file(path, name) for name in WEIGHTS):
            raise UserError(
                f"{path} has a config.json but no weights", remedy=f"complete the download; one of {', '.join(WEIGHTS)}"
            )
        content = read_json(path, "config.json")
        config = Qwen2_5OmniThinkerConfig.from_dict(content.get("thinker_config", content))
        stock = Qwen2_5OmniThinkerForConditionalGeneration
        module, report = stock.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise UserError(
                f"{path} lacks {len(missing)} of the thinker's weights, {missing[0]} first",
                cause="the checkpoint is incomplete, or config.json describes another model",
                remedy="fetch the checkpoint again",
            )
        module.to(device).eval().requires_grad_(False)
        return cls(module, AutoTokenizer.from_pretrained(path), read_settings(path), attention)

    # encoder side ----------------------------------------------------------------------------------------------------

    def open(self, info: MediaInfo, fps: float, **options: Any) -> MediaEncoder:
        """The encoder side of a new stream; options as in `OmniEncoder`.

        Raises:
            UserError: an unknown option, or a value that cannot be used.
        """
        check_options(OmniEncoder, options)
        return OmniEncoder(self, info, fps, **options)

    def prepass(self, sound: Iterable[np.ndarray]) -> dict[str, Any]:
        """{"mel_floor": ...} for `open`: the loudest log10 mel value of the whole sound track. With it features equal
        the stock ones; live streams do without.

        Args:
            sound: the track in blocks of (m,) float32 samples at `sampling_rate`.
        """
        return {"mel_floor": peak_log_mel(sound, self.preprocessing)}

    def window_s(self, fps: float) -> float:
        """Smallest multiple of 2 s (the audio tower's block) that holds whole temporal patches of 2 / fps seconds."""
        return paired_window_s(fps)

    def render(self, turn: Turn) -> RenderedTurn:
        """The ids of a turn; answers and the <|im_end|> that closes each are learned.

        Raises:
            UserError: a question or an answer holds a control token.
        """
        ids: list[int] = []
        labels: list[int] = []

        def add(text: str, said: str, learned: bool) -> None:
            new = self.encode(text, said)
            ids.extend(new)
            labels.extend(new if learned else [-100] * len(new))

        pairs = [*turn.earlier, (turn.question, turn.answer)]
        for i, (question, answer) in enumerate(pairs):
            opening = "\n<|im_start|>user\n" if i else ""
            add(f"{opening}{question}<|im_end|>\n<|im_start|>assistant\n", question, learned=False)
            if answer is not None:
                add(f"{answer}<|im_end|>", answer, learned=True)
        return RenderedTurn(torch.tensor(ids), torch.tensor(labels))

    def tokens_per_s(self, info: MediaInfo, fps: float, **options: Any) -> dict[str, float]:
        """Tokens a second of "visual" and "audio" for such a file; `options` may hold the pixel limits of `open`."""
        visual = 0.0
        if info.has_video:
            settings = self.video_settings(options.get("min_pixels"), options.get("max_pixels"))
            height, width = smart_resize(info.height, info.width, settings)
            visual = height * width / settings.factor**2 * fps / settings.pairing
        return {"visual": visual, "audio": float(POSITIONS_PER_S) if info.has_audio else 0.0}

    def shrink(self, frames: np.ndarray, **options: Any) -> np.ndarray:
        """As in the interface; `options` may hold the pixel limits of `open`."""
        settings = self.video_settings(options.get("min_pixels"), options.get("max_pixels"))
        size = smart_resize(frames.shape[1], frames.shape[2], settings)
        return resize(torch.from_numpy(frames), *size).permute(0, 2, 3, 1).contiguous().numpy()

    def encoding_settings(self) -> dict[str, Any]:
        """As in the interface, with the preprocessing."""
        return super().encoding_settings() | {"preprocessing": repr(self.preprocessing)}

    def video_settings(self, min_pixels: int | None = None, max_pixels: int | None = None) -> Settings:
        """The checkpoint's preprocessing with other pixel limits where given. A maximum below the checkpoint's minimum
        lowers the minimum too.

        Raises:
            UserError: limits of which no frame can be made.
        """
        return self.preprocessing.within(min_pixels, max_pixels)

    def encode_pictures(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Vision tower: (patches, pixels) and their grid to (tokens, E)."""
        shape = torch.tensor([grid], device=patches.device)
        return self.parts.visual(patches.to(self.dtype), grid_thw=shape).pooler_output

    def encode_sound(self, log_mel: Tensor) -> Tensor:
        """Audio tower: scaled log-mel (mels, f), f > 2, to (tokens, E)."""
        frames = torch.tensor([log_mel.shape[1]], device=self.device)
        return self.parts.audio(log_mel.to(self.device, self.dtype), feature_lens=frames).last_hidden_state

    def convert_adapter(self, source: Path, target: Path, layout: str) -> None:
        """As in the interface. "thinker": names of the stock thinker class; "omni": of the full Omni model."""
        super().convert_adapter(source, target, self.adapter_layouts[0])
        if layout == "omni":
            tensors = load_file(source / "adapter_model.safetensors")
            renamed = {k.replace("base_model.model.", "base_model.model.thinker.", 1): v for k, v in tensors.items()}
            save_file(renamed, target / "adapter_model.safetensors", metadata={"format": "pt"})

    def embed(self, ids: Tensor) -> Tensor:
        """(n,) ids to (n, E), detached: the embedding matrix is never trained here."""
        return self.parts.text.embed_tokens(ids).detach()  # type: ignore[operator]

    def encode(self, text: str, *written_by_users: str) -> list[int]:
        """Token ids of `text`, control tokens included.

        Raises:
            UserError: one of the parts that users wrote holds a control token, or is no text.
        """
        for part in written_by_users:
            check_text(part, self._control_tokens)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def token_ids(self, tokens: list[str]) -> list[int]:
        """Ids of control tokens."""
        return self.tokenizer.convert_tokens_to_ids(tokens)
