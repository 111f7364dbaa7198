"""video-SALMONN 2+ behind the streaming interface, either backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from omnimem_train.models.checks import check_options, paired_window_s
from omnimem_train.models.interface import (
    MediaEncoder,
    MediaInfo,
    RenderedTurn,
    StreamingModel,
    Turn,
)
from omnimem_train.models.salmonn import media
from omnimem_train.models.salmonn.adapter import export_adapter
from omnimem_train.models.salmonn.decoder import VideoSalmonn2Decoder
from omnimem_train.models.salmonn.encoder import SalmonnEncoder
from omnimem_train.models.salmonn.media import SAMPLING_RATE, Sampling
from omnimem_train.models.salmonn.model import VideoSalmonn2ForConditionalGeneration
from omnimem_train.models.salmonn.positions import TICKS_PER_S
from omnimem_train.models.salmonn.processor import VideoSalmonn2Processor

END_TOKENS = ("<|im_end|>", "<|endoftext|>")


class VideoSalmonn2Streaming(VideoSalmonn2Decoder, StreamingModel):
    """A video-SALMONN 2+ that can be run on a stream.

    Args:
        module: the model.
        processor: its processor.
        attention: kernel of the decoder's attention, one of `omnimem_train.models.attention.KERNELS`.
    """

    adapter_layouts = ("peft", "salmonn")

    def __init__(
        self, module: VideoSalmonn2ForConditionalGeneration, processor: VideoSalmonn2Processor, attention: str = "sdpa"
    ) -> None:
        super().__init__(module, processor, attention)
        self.tokenizer = processor.tokenizer
        self.sampling_rate = SAMPLING_RATE
        self.eos_ids = tuple(ids[0] for token in END_TOKENS if len(ids := self.encode(token)) == 1)

    @classmethod
    def from_checkpoint(cls, path: str, *, dtype: str, device: torch.device, attention: str) -> VideoSalmonn2Streaming:
        """Load the checkpoint at `path`, frozen, in evaluation mode. Arguments as in `load_model`.

        Raises:
            UserError: see `VideoSalmonn2ForConditionalGeneration.from_pretrained`.
        """
        module = VideoSalmonn2ForConditionalGeneration.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        module.to(device).eval().requires_grad_(False)
        return cls(module, VideoSalmonn2Processor.from_pretrained(path), attention)

    def convert_adapter(self, source: Path, target: Path, layout: str) -> None:
        """As in the interface. "peft": names of the class here; "salmonn": those of the public code."""
        if layout == "salmonn":
            export_adapter(source, target, self.config.backbone)
        else:
            super().convert_adapter(source, target, layout)

    def open(self, info: MediaInfo, fps: float, **options: Any) -> MediaEncoder:
        """The encoder side of a new stream; options as in `SalmonnEncoder`.

        Raises:
            UserError: an unknown option, or a value that cannot be used.
        """
        check_options(SalmonnEncoder, options)
        return SalmonnEncoder(self, info, fps, **options)

    def window_s(self, fps: float) -> float:
        """Smallest multiple of 2 s that holds whole frame pairs. Sound is gathered to its 30 s by the encoder."""
        return paired_window_s(fps)

    def encoding_settings(self) -> dict[str, Any]:
        """As in the interface, with the rules for pictures."""
        return super().encoding_settings() | {"pictures": repr(self.processor.rules)}

    def render(self, turn: Turn) -> RenderedTurn:
        """The ids of a turn, a newline before the first question; answers with the <|im_end|> and newline that close
        them are learned.

        Raises:
            UserError: a question or an answer holds a control token.
        """
        ids: list[int] = []
        labels: list[int] = []
        for i, (question, answer) in enumerate([*turn.earlier, (turn.question, turn.answer)]):
            opening = "<|im_start|>user\n" if i else "\n"
            new = self.encode(f"{opening}{question}<|im_end|>\n<|im_start|>assistant\n", question)
            ids, labels = ids + new, labels + [-100] * len(new)
            if answer is not None:
                new = self.encode(f"{answer}<|im_end|>\n", answer)
                ids, labels = ids + new, labels + new
        return RenderedTurn(torch.tensor(ids), torch.tensor(labels))

    def tokens_per_s(self, info: MediaInfo, fps: float, **options: Any) -> dict[str, float]:
        """Tokens a second of "visual" and "audio" for such a file; `options` may hold the pixel limits of `open`."""
        visual = 0.0
        if info.has_video:
            limits = (options.get("max_pixels", 61250), options.get("min_pixels", 784))
            rules = self.processor.rules
            height, width = media.resized(info.height, info.width, 2, Sampling(1.0, 1, 2, *limits), rules)
            visual = height * width / (rules.patch * rules.merge) ** 2 * fps / rules.pairing
        return {"visual": visual, "audio": float(TICKS_PER_S) if info.has_audio else 0.0}
