"""video-SALMONN 2+ for the stream loop: the decoder layer by layer, encoders piece by piece, a prompt as one block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from omnimem_train.memory.state import AUDIO, TEXT, VISUAL
from omnimem_train.models.checks import check_text
from omnimem_train.models.decoder import DEEPSTACK, StockDecoder
from omnimem_train.models.interface import TokenBlock
from omnimem_train.models.salmonn.config import VideoSalmonn2Config
from omnimem_train.models.salmonn.model import VideoSalmonn2ForConditionalGeneration
from omnimem_train.models.salmonn.processor import VideoSalmonn2Processor

CONTROL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|audio_pad|>")


class VideoSalmonn2Decoder(StockDecoder):
    """The decoder of a `VideoSalmonn2ForConditionalGeneration`, layer by layer, and what feeds it.

    Args:
        module: the model; its decoder's attention is switched to this package's.
        processor: its processor.
        attention: one of `omnimem_train.models.attention.KERNELS`.
    """

    def __init__(
        self, module: VideoSalmonn2ForConditionalGeneration, processor: VideoSalmonn2Processor, attention: str = "sdpa"
    ) -> None:
        super().__init__(module, module.model.language_model, module.lm_head, attention)
        self._model, self.processor = module, processor
        self.config: VideoSalmonn2Config = module.config

    def prompt_block(self, inputs: Mapping[str, Any], position_scheme: str | None = None) -> TokenBlock:
        """A whole prompt as tokens for the layers: what `forward` would run, media encoded in one go.

        Args:
            inputs: one sample of the processor: `input_ids` (1, n) and its media.
            position_scheme: None for the configuration's.

        Returns:
            A block of n tokens, times unknown (0). With deepstack features as extras if the backbone has them.
        """
        model, config, ids = self._model.model, self._model.config, inputs["input_ids"]
        visual, audio = ids == config.video_token_id, ids == config.audio_token_id
        seconds = inputs.get("second_per_grid_ts")
        index, _ = self._model.get_rope_index(
            ids, inputs.get("video_grid_thw"), seconds, position_scheme=position_scheme
        )
        embeds, extras = model.get_input_embeddings()(ids), {}
        if inputs.get("pixel_values_videos") is not None:
            rows = model.encode_video(inputs["pixel_values_videos"], inputs["video_grid_thw"])
            embeds = embeds.masked_scatter(visual[..., None], rows.rows.to(embeds.dtype))
            if rows.deepstack:
                extras[DEEPSTACK] = self.deepstack(visual, rows.deepstack)
        if inputs.get("audio_feature") is not None:
            sounds = model.encode_audio(inputs["audio_feature"])
            embeds = embeds.masked_scatter(audio[..., None], sounds.to(embeds.dtype))
        modality = torch.full(ids.shape, TEXT, dtype=torch.int8, device=ids.device)
        modality = modality.masked_fill(visual, VISUAL).masked_fill(audio, AUDIO)
        time_s = torch.zeros(ids.shape, device=ids.device)
        return TokenBlock(embeds, index.permute(1, 2, 0), modality, time_s, extras)

    def deepstack(self, visual: Tensor, features: tuple[Tensor, ...]) -> Tensor:
        """Features (tokens, E) of each layer spread over a sequence: (B, n, layers, E), 0 where `visual` is False."""
        stacked = torch.stack(features, dim=1)
        out = torch.zeros(*visual.shape, *stacked.shape[1:], dtype=stacked.dtype, device=stacked.device)
        return out.masked_scatter(visual[..., None, None], stacked)

    def encode_pictures(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Patches and their grid -> (tokens, 1 + layers, E): rows, and deepstack features for the first layers."""
        shape = torch.tensor([grid], device=self.device)
        made = self._model.model.encode_video(patches.to(self.device), shape)
        return torch.stack([made.rows, *made.deepstack], dim=1).to(self.dtype)

    def encode_sound(self, log_mel: Tensor) -> Tensor:
        """(windows, 128, 3000) -> (windows * 60, E)."""
        return self._model.model.encode_audio(log_mel.to(self.device)).to(self.dtype)

    def embed(self, ids: list[int]) -> Tensor:
        """(n,) ids to (n, E), detached: the embedding matrix is never trained here."""
        return self._text.embed_tokens(torch.tensor(ids, dtype=torch.int64, device=self.device)).detach()

    def encode(self, text: str, *written_by_users: str) -> list[int]:
        """Token ids of `text`, control tokens included.

        Raises:
            UserError: one of the parts that users wrote holds a control token.
        """
        for part in written_by_users:
            check_text(part, CONTROL)
        return list(self.processor.tokenizer.encode(text, add_special_tokens=False))
