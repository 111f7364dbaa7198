"""video-SALMONN 2+ (arXiv 2506.15220) from stock parts: a Qwen2.5-VL or Qwen3-VL decoder and vision tower, and `audio`.

One class for both backbones; its modules are `model.language_model`, `model.visual`, `model.audio` and `lm_head`. The
published Qwen2.5-VL checkpoints write `model.`, `visual.`, `audio.` instead, which is converted on loading and saving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from omnimem_train.errors import UserError
from omnimem_train.models.salmonn.audio import VideoSalmonn2Audio
from omnimem_train.models.salmonn.config import VideoSalmonn2AudioConfig, VideoSalmonn2Config, check_scheme
from omnimem_train.models.salmonn.files import OLD_KEYS, check_loaded, save_published
from omnimem_train.models.salmonn.positions import Marks, VideoGrid, positions

VISION = {"qwen2_5_vl": qwen2_5.Qwen2_5_VisionTransformerPretrainedModel, "qwen3_vl": qwen3.Qwen3VLVisionModel}
LANGUAGE = {"qwen2_5_vl": qwen2_5.Qwen2_5_VLTextModel, "qwen3_vl": qwen3.Qwen3VLTextModel}
MEDIA = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "audio_feature")


@dataclass
class VideoSalmonn2Output(CausalLMOutputWithPast):
    """`rope_deltas` (B, 1): largest index + 1 - length of the prompt."""

    rope_deltas: Tensor | None = None


@dataclass(frozen=True)
class VisualRows:
    """Rows (tokens, width) for the video tokens; `deepstack[i]` (tokens, width) is added to the output of layer i
    there."""

    rows: Tensor
    deepstack: tuple[Tensor, ...]


class VideoSalmonn2PreTrainedModel(PreTrainedModel):
    """What transformers wants to know about the class."""

    config_class = VideoSalmonn2Config
    config: VideoSalmonn2Config
    base_model_prefix = "model"
    input_modalities = ("video", "audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = (
        "Qwen2_5_VLDecoderLayer",
        "Qwen2_5_VLVisionBlock",
        "Qwen3VLTextDecoderLayer",
        "Qwen3VLVisionBlock",
        "WhisperEncoderLayer",
    )
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class VideoSalmonn2Model(VideoSalmonn2PreTrainedModel):
    """Encoders and decoder without the output matrix."""

    def __init__(self, config: VideoSalmonn2Config) -> None:
        super().__init__(config)
        self.visual = VISION[config.backbone]._from_config(config.vision_config)
        self.language_model = LANGUAGE[config.backbone]._from_config(config.text_config)
        self.audio = VideoSalmonn2Audio._from_config(config.audio_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.language_model.embed_tokens = value

    def encode_video(self, pixel_values_videos: Tensor, video_grid_thw: Tensor) -> VisualRows:
        """Flattened patches (patches, values) with their grids (videos, 3) -> rows in token order."""
        out = self.visual(pixel_values_videos.to(self.visual.dtype), grid_thw=video_grid_thw, return_dict=True)
        return VisualRows(rows=out.pooler_output, deepstack=tuple(getattr(out, "deepstack_features", None) or ()))

    def encode_audio(self, audio_feature: Tensor) -> Tensor:
        """Log-mel (windows, 128, 3000) -> (windows * 60, width)."""
        return self.audio(audio_feature)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        audio_feature: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Embeds, puts the media's rows in place, runs the decoder. Arguments as in the class with the output
        matrix."""
        deepstack: dict[str, Any] = {}
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values_videos is not None:
            assert input_ids is not None
            assert video_grid_thw is not None
            visual = self.encode_video(pixel_values_videos, video_grid_thw)
            inputs_embeds, where = _put(inputs_embeds, input_ids.eq(self.config.video_token_id), visual.rows, "video")
            if visual.deepstack:
                deepstack = {"visual_pos_masks": where, "deepstack_visual_embeds": list(visual.deepstack)}
        if audio_feature is not None:
            assert input_ids is not None
            rows = self.encode_audio(audio_feature)
            inputs_embeds, _ = _put(inputs_embeds, input_ids.eq(self.config.audio_token_id), rows, "audio")
        return self.language_model(
            input_ids=None,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **deepstack,
            **kwargs,
        )


class VideoSalmonn2ForConditionalGeneration(VideoSalmonn2PreTrainedModel, GenerationMixin):
    """video-SALMONN 2+ with its output matrix; loads and saves published folders."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: VideoSalmonn2Config) -> None:
        super().__init__(config)
        text = config.text_config
        self.model = VideoSalmonn2Model(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.rope_deltas: Tensor | None = None
        self.post_init()

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a published folder (Qwen2.5-VL keys in the old layout, or Qwen3-VL keys), sharded or not, or one of
        ours.

        Further arguments as in transformers. Nothing may be missing, left over or of another size.

        Raises:
            UserError: no `audio_config` (a stock checkpoint); keys that are missing, surplus or of another size,
            listed.
        """
        with_info = kwargs.pop("output_loading_info", False)
        if not isinstance(kwargs.get("config"), VideoSalmonn2Config):
            kwargs["config"] = VideoSalmonn2Config.from_pretrained(kwargs.get("config") or path)
        kwargs["ignore_mismatched_sizes"] = True
        kwargs.setdefault("key_mapping", OLD_KEYS)
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        check_loaded(str(path), info, tied=model.config.tie_word_embeddings)
        return (model, info) if with_info else model

    def save_pretrained(self, folder: Any, *, published: bool = True, **kwargs: Any) -> None:
        """Writes weights and configuration.

        Args:
            folder: where to.
            published: in the published layout, which the public code loads and `from_pretrained` here too. Otherwise
                under our own model type, which `AutoConfig` and `AutoModel` know once this package is imported.
            **kwargs: as in transformers.
        """
        if not published:
            kwargs.setdefault("save_original_format", False)
            super().save_pretrained(folder, **kwargs)
            return
        save_published(self, super().save_pretrained, folder, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Any = None,
        audio_feature: Tensor | None = None,
        position_scheme: str | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> VideoSalmonn2Output:
        """One pass over a prompt or a step of decoding.

        Args:
            input_ids: (B, n).
            attention_mask: (B, n), 0 where padded.
            position_ids: (3, B, n); computed by `position_scheme` if not given.
            past_key_values: a cache; its `position_ids` go on by `rope_deltas`.
            inputs_embeds: (B, n, width) instead of ids; then the caller has put the media in and gives `position_ids`.
            labels: (B, n), -100 where nothing is learned; not shifted.
            pixel_values_videos: (patches, values), all videos of the batch one after the other.
            video_grid_thw: (videos, 3) patch grids.
            second_per_grid_ts: (videos,) seconds per frame pair, None where unknown.
            audio_feature: (windows, 128, 3000) log-mel, all sounds of the batch one after the other.
            position_scheme: "training" or "generation" (Qwen2.5-VL backbone), None for the configuration's.
            logits_to_keep: how many last rows of logits, 0 for all; or their indices.

        Raises:
            UserError: media that do not fit the ids; unknown scheme.
        """
        if position_ids is None:
            position_ids = self._positions(
                input_ids, inputs_embeds, attention_mask, past_key_values, video_grid_thw, second_per_grid_ts,
                position_scheme,
            )  # fmt: skip
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            audio_feature=audio_feature,
            **kwargs,
        )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        if isinstance(logits_to_keep, Tensor):
            rows = logits_to_keep  # type: ignore[assignment]
        logits = self.lm_head(out.last_hidden_state[:, rows])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        return VideoSalmonn2Output(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            rope_deltas=self.rope_deltas,
        )

    def get_rope_index(
        self,
        input_ids: Tensor,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Any = None,
        attention_mask: Tensor | None = None,
        position_scheme: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(3, B, n) indices and (B, 1) rope deltas; see `positions`."""
        c = self.config
        marks = Marks(c.video_token_id, c.audio_token_id, c.vision_start_token_id, c.vision_end_token_id)
        scheme = check_scheme(c.backbone, position_scheme or c.position_scheme)
        grids = video_grids(video_grid_thw, second_per_grid_ts, c.vision_config.spatial_merge_size)
        return positions(input_ids, grids, marks, scheme, attention_mask)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Media go in with the prompt alone; indices are computed in `forward`."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        inputs["position_ids"] = None
        if _seen(inputs.get("past_key_values")):
            inputs |= dict.fromkeys(MEDIA)
        return inputs

    def _positions(
        self,
        ids: Tensor | None,
        embeds: Tensor | None,
        mask: Tensor | None,
        past: Any,
        grid_thw: Tensor | None,
        seconds: Any,
        scheme: str | None,
    ) -> Tensor:
        """Of a prompt by scheme, of what follows it by its rope delta."""
        seen = _seen(past)
        if not seen and ids is not None:
            flat_mask = mask if mask is not None and mask.ndim == 2 else None
            index, self.rope_deltas = self.get_rope_index(ids, grid_thw, seconds, flat_mask, scheme)
            return index
        given = ids if ids is not None else embeds
        assert given is not None
        batch, n = given.shape[:2]
        if not seen:
            self.rope_deltas = torch.zeros(batch, 1, dtype=torch.int64, device=given.device)
        assert self.rope_deltas is not None
        steps = torch.arange(seen, seen + n, device=given.device).expand(batch, -1)
        if mask is not None and mask.ndim == 2:
            steps = mask.long().cumsum(-1)[:, -n:] - 1
        return (steps + self.rope_deltas.to(given.device)).expand(3, -1, -1)

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:
        if expand_size > 1 and any(kwargs.get(name) is not None for name in MEDIA):
            raise UserError(
                f"{expand_size} beams or sequences from one prompt with media",
                "patches and windows have no batch dimension to repeat",
                "use greedy decoding or sampling with num_return_sequences=1",
            )
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)


def video_grids(grid_thw: Tensor | None, seconds: Any, merge: int) -> list[VideoGrid]:
    """Patch grids (videos, 3) and seconds per pair (videos,) as `VideoGrid`s; more seconds than videos are ignored (the
    public pipeline stores one value three times)."""
    if grid_thw is None:
        return []
    rows = grid_thw.tolist()
    each = [None] * len(rows) if seconds is None else [None if s is None else float(s) for s in seconds]
    if len(each) < len(rows):
        raise UserError(
            f"{len(each)} values of seconds per frame pair for {len(rows)} videos",
            "each video has its own",
            "pass one value per video, or none at all",
        )
    return [VideoGrid(t, h // merge, w // merge, s) for (t, h, w), s in zip(rows, each, strict=False)]


def _seen(past: Any) -> int:
    return 0 if past is None else int(past.get_seq_length())


def _put(embeds: Tensor, where: Tensor, rows: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rows in place of the embeddings at `where` (B, n), in sequence order; and `where`."""
    if int(where.sum()) != len(rows):
        raise UserError(
            f"{int(where.sum())} {kind} tokens in the ids and {len(rows)} rows from the encoder",
            "ids and media are of different clips or settings",
            "take both from one call of the processor",
        )
    return embeds.masked_scatter(where.unsqueeze(-1), rows.to(embeds.dtype)), where


AutoConfig.register(VideoSalmonn2Config.model_type, VideoSalmonn2Config)
AutoConfig.register(VideoSalmonn2AudioConfig.model_type, VideoSalmonn2AudioConfig)
AutoModel.register(VideoSalmonn2Config, VideoSalmonn2Model)
AutoModelForImageTextToText.register(VideoSalmonn2Config, VideoSalmonn2ForConditionalGeneration)
