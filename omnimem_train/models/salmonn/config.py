"""Configuration of video-SALMONN 2+, and its two ways of being written.

The published folders say `model_type: qwen2_5_vl` (or `qwen3_vl`) and carry an `audio_config`; a stock library maps
them to its own class and drops the audio part. Here such a `config.json` is recognised by its `audio_config` and
converted when read;
`VideoSalmonn2Config.published` writes it back.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig, WhisperConfig
from transformers import __version__ as transformers_version

from omnimem_train.errors import UserError

BACKBONES = {
    "qwen2_5_vl": ("training", "generation"),
    "qwen3_vl": ("timestamps",),
}
"""Backbone -> its position schemes, the default one first (see `positions`)."""

ARCHITECTURES = {"qwen2_5_vl": "video_SALMONN2_plus", "qwen3_vl": "Qwen3VLForConditionalGeneration"}
TOKEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "audio_token_id": {"qwen2_5_vl": 151665, "qwen3_vl": 151669},
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
}
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class VideoSalmonn2AudioConfig(WhisperConfig):
    """Whisper encoder, Q-Former and how the encoder's frames are cut.

    Args:
        qformer_config: the Q-Former's settings under BERT's names: `hidden_size`, `num_attention_heads`,
            `num_hidden_layers`, `intermediate_size`, `layer_norm_eps`, `hidden_act`, `encoder_width`, `query_length`,
            and `out_hidden_size` (the decoder's width). Further keys are kept and written back.
        second_per_window, second_stride: length and distance of the pieces in seconds.
    """

    model_type = "video_salmonn2_audio"
    base_config_key = "audio_config"

    qformer_config: Any = None
    second_per_window: float = 0.5
    second_stride: float = 0.5

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.qformer_config or {}
        self.qformer_config = {**_qformer_defaults(self.d_model), **given}
        super().__post_init__(**kwargs)

    def piece_frames(self) -> tuple[int, int]:
        """Frames in a piece, and between the beginnings of two pieces."""
        per_s = self.max_source_positions / 30
        return round(per_s * self.second_per_window), round(per_s * self.second_stride)

    def tokens_per_window(self) -> int:
        """Audio tokens of a window of 30 s: 60 with the published settings (a constant in the public code)."""
        size, stride = self.piece_frames()
        return (self.max_source_positions - size) // stride + 1


def _qformer_defaults(encoder_width: int) -> dict[str, Any]:
    return {
        "hidden_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 2,
        "intermediate_size": 12288,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "max_position_embeddings": 512,
        "encoder_width": encoder_width,
        "query_length": 1,
    }


class VideoSalmonn2Config(PreTrainedConfig):
    """Decoder and vision tower of a stock Qwen2.5-VL or Qwen3-VL, and an audio part.

    Args:
        backbone: "qwen2_5_vl" (3B, 7B, 72B) or "qwen3_vl" (the 4B and 8B of the OmniMem release).
        text_config, vision_config: stock configurations of the backbone.
        audio_config: see `VideoSalmonn2AudioConfig`.
        position_scheme: one of `BACKBONES[backbone]`; None for the first of them.

    Raises:
        UserError: unknown backbone or position scheme; a Q-Former whose sizes do not fit its neighbours.
    """

    model_type = "video_salmonn2"
    sub_configs = {  # noqa: RUF012
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
        "audio_config": VideoSalmonn2AudioConfig,
    }

    backbone: str = "qwen2_5_vl"
    text_config: Any = None
    vision_config: Any = None
    audio_config: Any = None
    position_scheme: str | None = None
    image_token_id: Any = None
    video_token_id: Any = None
    audio_token_id: Any = None
    vision_start_token_id: Any = None
    vision_end_token_id: Any = None
    vision_token_id: Any = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.backbone not in BACKBONES:
            raise UserError(
                f"backbone {self.backbone!r} is not known", f"known are {', '.join(BACKBONES)}", "choose one of them"
            )
        self.position_scheme = check_scheme(self.backbone, self.position_scheme)
        for name, default in TOKEN_IDS.items():
            if getattr(self, name) is None:
                setattr(self, name, default[self.backbone] if isinstance(default, dict) else default)
        self.text_config = _sub_config(self.text_config, f"{self.backbone}_text")
        self.vision_config = _sub_config(self.vision_config, f"{self.backbone}_vision")
        if not isinstance(self.audio_config, PreTrainedConfig):
            audio = {k: v for k, v in (self.audio_config or {}).items() if k != "model_type"}
            self.audio_config = VideoSalmonn2AudioConfig(**audio)
        self.audio_config.qformer_config.setdefault("out_hidden_size", self.text_config.hidden_size)
        _check_qformer(self)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The `config.json` of `path` under our names, whichever of the two layouts it is in."""
        found, kwargs = super().get_config_dict(path, **kwargs)
        return (found if found.get("model_type") == cls.model_type else from_published(found, str(path))), kwargs

    def published(self) -> dict[str, Any]:
        """The configuration as the public code reads it: the backbone's own layout and `audio_config`."""
        text, vision, audio = (_own_keys(part) for part in (self.text_config, self.vision_config, self.audio_config))
        _old_rope(text)
        vision["model_type"] = self.backbone
        vision.pop("rope_parameters", None)
        audio |= {"model_type": "whisper", "num_hidden_layers": self.audio_config.encoder_layers}
        dtype = str(self.dtype or self.text_config.dtype or "float32").removeprefix("torch.")
        out = {
            **{name: getattr(self, name) for name in TOKEN_IDS},
            **{name: text[name] for name in ENDS if text.get(name) is not None},
            "architectures": [ARCHITECTURES[self.backbone]],
            "audio_config": audio,
            "dtype": dtype,
            "model_type": self.backbone,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "transformers_version": transformers_version,
            "vision_config": vision,
        }
        if self.backbone == "qwen3_vl":
            return {**out, "text_config": {**text, "dtype": dtype}}
        # transformers 4 takes a number here; the configuration of transformers 5 forgets it when the window is unused.
        text["sliding_window"] = text.get("sliding_window") or 32768
        return {**{k: v for k, v in text.items() if k != "layer_types"}, **out}


def from_published(found: dict[str, Any], source: str) -> dict[str, Any]:
    """Our names for a published `config.json`.

    Args:
        found: its content.
        source: where it is from, for the message.

    Raises:
        UserError: not a video-SALMONN 2+ configuration.
    """
    backbone = found.get("model_type", "")
    if backbone not in BACKBONES:
        raise UserError(
            f"{source}: config.json says model type {backbone!r}",
            f"video-SALMONN 2+ is published as one of {', '.join(BACKBONES)}",
            "give the folder of a video-SALMONN 2+ checkpoint",
        )
    if not found.get("audio_config"):
        raise UserError(
            f"{source}: config.json has no audio_config",
            f"this is a stock {backbone} checkpoint; video-SALMONN 2+ adds an audio encoder and a Q-Former to it",
            "give the folder of a video-SALMONN 2+ checkpoint",
        )
    dropped = ("model_type", "audio_config", "architectures", "transformers_version")
    kept = {k: v for k, v in found.items() if k not in dropped}
    stock = AutoConfig.for_model(backbone, **kept)
    out = {name: found[name] for name in TOKEN_IDS if name in found}
    dtype = found.get("dtype", found.get("torch_dtype"))
    return {
        **out,
        "model_type": VideoSalmonn2Config.model_type,
        "backbone": backbone,
        "text_config": stock.text_config.to_dict(),
        "vision_config": stock.vision_config.to_dict(),
        "audio_config": found["audio_config"],
        "tie_word_embeddings": bool(stock.tie_word_embeddings),
        **({} if dtype is None else {"dtype": dtype}),
    }


def check_scheme(backbone: str, scheme: str | None) -> str:
    """`scheme`, or the default one; `UserError` if the backbone has no such scheme."""
    schemes = BACKBONES[backbone]
    if scheme is None:
        return schemes[0]
    if scheme not in schemes:
        raise UserError(
            f"position scheme {scheme!r} does not belong to the backbone {backbone}",
            f"it has {', '.join(schemes)}",
            "choose one of them, or leave it out",
        )
    return scheme


def _sub_config(given: dict | PreTrainedConfig | None, model_type: str) -> PreTrainedConfig:
    if isinstance(given, PreTrainedConfig):
        return given
    return AutoConfig.for_model(model_type, **{k: v for k, v in (given or {}).items() if k != "model_type"})


def _check_qformer(config: VideoSalmonn2Config) -> None:
    audio, text = config.audio_config, config.text_config
    sizes = audio.qformer_config
    for name, neighbour, width in (
        ("out_hidden_size", "the decoder's width", text.hidden_size),
        ("encoder_width", "the audio encoder's width", audio.d_model),
    ):
        if sizes[name] != width:
            raise UserError(
                f"audio_config.qformer_config.{name} is {sizes[name]}",
                f"{neighbour} is {width}, and the two must be equal",
                "take the configuration and the weights from one checkpoint",
            )


def _old_rope(text: dict[str, Any]) -> None:
    """Rotary settings under the names of transformers 4."""
    rope = dict(text.pop("rope_parameters", None) or {})
    text["rope_theta"] = rope.pop("rope_theta", 1e6)
    if text["model_type"] == "qwen2_5_vl_text":
        rope.setdefault("type", rope.get("rope_type", "default"))
    text["rope_scaling"] = rope


def _own_keys(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings, without those that every configuration has and this one left alone."""
    every = PreTrainedConfig().to_dict()
    return {k: v for k, v in config.to_dict().items() if k != "dtype" and (k not in every or v != every[k])}
