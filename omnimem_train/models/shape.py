"""The shape of a model from its `config.json` alone: sizes, parameters, tokens of a clip. No weights are needed.

Parameters are counted on the stock class itself, made on torch's meta device, where it takes no memory. Published
models are known by name, so that nothing has to be fetched to plan for one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from omnimem_train.errors import UserError
from omnimem_train.models.checks import check_options
from omnimem_train.models.layout import POSITIONS_PER_S
from omnimem_train.models.loading import MODELS, model_class, read_json
from omnimem_train.models.preprocess import Settings, read_settings, smart_resize

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Decoders of Qwen2.5 (arXiv 2412.15115), the vision tower of Qwen2.5-VL (arXiv 2502.13923) and the encoder of Whisper
# large-v3 (arXiv 2212.04356), with the sizes their config.json files state. Qwen2.5-Omni-3B is taken to have an output
# matrix of its own.
_QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
_QWEN_7B |= {"num_key_value_heads": 4, "vocab_size": 152064}
_QWEN_3B = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
_QWEN_3B |= {"num_key_value_heads": 2, "vocab_size": 151936}
_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
_WHISPER = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
_WHISPER |= {"num_mel_bins": 128}


def _published(kind: str, text: dict[str, Any], tied: bool = False) -> dict[str, Any]:
    width = text["hidden_size"]
    vision, audio = _VISION | {"out_hidden_size": width}, dict[str, Any](_WHISPER)
    if kind == "qwen2_5_omni_thinker":
        audio["output_dim"] = width
    parts = {"text_config": text, "vision_config": vision, "audio_config": audio}
    return {"model_type": kind, "dtype": "bfloat16", "tie_word_embeddings": tied, **parts}


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-Omni-7B": _published("qwen2_5_omni_thinker", _QWEN_7B),
    "Qwen/Qwen2.5-Omni-3B": _published("qwen2_5_omni_thinker", _QWEN_3B),
    "tsinghua-ee/video-SALMONN-2_plus_7B": _published("video_salmonn2", _QWEN_7B),
    "tsinghua-ee/video_SALMONN2plus_7B_audioAlign": _published("video_salmonn2", _QWEN_7B),
    "tsinghua-ee/video-SALMONN-2_plus_3B": _published("video_salmonn2", _QWEN_3B, tied=True),
}
"""Hub name -> what its config.json says about sizes."""


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, mlp, vocabulary: as in config.json.
        deepstack: layers that get features of the vision tower (Qwen3-VL), which travel with each token.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    deepstack: int = 0

    @property
    def query_width(self) -> int:
        """Channels of all query heads, H * D."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Channels of all kv heads, G * D."""
        return self.kv_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Linear map of a layer -> (channels in, channels out)."""
        e, q, k, m = self.hidden, self.query_width, self.key_width, self.mlp
        sides = ((e, q), (e, k), (e, k), (q, e), (e, m), (e, m), (m, e))
        return dict(zip(PROJECTIONS, sides, strict=True))

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of a layer (biases and norms left out)."""
        return sum(i * o for i, o in self.projections.values())

    def adapter_weights(self, rank: int, targets: tuple[str, ...]) -> int:
        """Numbers in LoRA adapters of `rank` on `targets` in all layers.

        Raises:
            UserError: a target that a layer does not have.
        """
        if unknown := [t for t in targets if t not in self.projections]:
            raise UserError(f"LoRA target {unknown[0]!r}", remedy=f"choose from: {', '.join(PROJECTIONS)}")
        return self.layers * rank * sum(sum(self.projections[t]) for t in targets)


@dataclass(frozen=True)
class ClipTokens:
    """Tokens of a clip, and what makes them.

    Attributes:
        visual, audio, text: tokens in the stream; `text` is the prompt, marks and time stamps, without the question.
        patches: patches that go through the vision tower.
        rows, columns: tokens of a temporal patch (two frames).
    """

    visual: int
    audio: int
    text: int
    patches: int
    rows: int
    columns: int

    @property
    def total(self) -> int:
        """All tokens of the stream."""
        return self.visual + self.audio + self.text


@dataclass(frozen=True)
class ModelShape:
    """A model by its sizes.

    Attributes:
        path: as it was given.
        kind: model_type of config.json.
        dtype: the checkpoint is stored in.
        decoder: sizes of the language model.
        parameters: numbers of the whole model.
        vision, audio: numbers of the towers.
        settings: preprocessing of pictures (Qwen2.5-Omni), else None.
        rules: preprocessing of pictures (video-SALMONN 2+), else None.
    """

    path: str
    kind: str
    dtype: str
    decoder: DecoderShape
    parameters: int
    vision: int
    audio: int
    settings: Settings | None = None
    rules: Any = None

    def clip(
        self, seconds: float, width: int, height: int, fps: float, *, sound: bool = True, **options: Any
    ) -> ClipTokens:
        """Tokens of a clip with a picture of `width` x `height` pixels; `options` as in `StreamingModel.open`.

        Raises:
            UserError: an option that the model's encoder does not have, or a value that cannot be used.
        """
        if self.settings is not None:
            from omnimem_train.models.encoding import OmniEncoder as Encoder
        else:
            from omnimem_train.models.salmonn.encoder import SalmonnEncoder as Encoder  # type: ignore[assignment]
        check_options(Encoder, options)
        frames = math.ceil(seconds * fps - 1e-6)
        pairs = math.ceil(frames / 2)
        if self.settings is not None:
            limits = options.get("min_pixels"), options.get("max_pixels")
            settings = self.settings.within(*limits)
            side, merge = settings.factor, settings.merge
            size = smart_resize(height, width, settings)
            audio, text = _omni_audio(seconds), OPENING + 1 + int(sound)
        else:
            size, audio, text = self._salmonn(seconds, (width, height), fps, pairs, options)
            side, merge = self.rules.patch * self.rules.merge, self.rules.merge
        rows, columns = size[0] // side, size[1] // side
        visual = pairs * rows * columns
        return ClipTokens(visual, audio if sound else 0, text, visual * merge**2, rows, columns)

    def _salmonn(
        self, seconds: float, size: tuple[int, int], fps: float, pairs: int, options: dict[str, Any]
    ) -> tuple[tuple[int, int], int, int]:
        """Size of resized frames (height, width), tokens of sound, tokens of text."""
        from omnimem_train.models.salmonn import media
        from omnimem_train.models.salmonn.positions import TICKS_PER_S
        from omnimem_train.models.salmonn.processor import MAX_TIMESTAMPS

        limits = (options.get("max_pixels", 61250), options.get("min_pixels", 784))
        resized = media.resized(size[1], size[0], 2, media.Sampling(1.0, 1, 2, *limits), self.rules)
        audio = math.ceil(seconds / media.WINDOW_S) * media.WINDOW_S * TICKS_PER_S
        if not self.rules.whole_clip:
            return resized, audio, OPENING + 1
        group = max(1, math.ceil(pairs / options.get("max_timestamps", MAX_TIMESTAMPS)))
        stamps = sum(STAMP + len(str(int(2 * k / fps))) for k in range(0, pairs, group))
        return resized, audio, OPENING + stamps


OPENING = 14
"""Tokens of the default system prompt and of the beginning of the user's message, in the published vocabularies."""
STAMP = 7
"""Tokens of a time stamp without the digits before the point: "<", ".", a digit, " seconds", ">", and two marks."""


def _omni_audio(seconds: float) -> int:
    """Sound tokens of Qwen2.5-Omni: mel frames of 10 ms, halved by a convolution, then by pooling, in blocks of 2 s."""
    frames = math.ceil(round(seconds * 16000) / 160)
    blocks, rest = divmod(frames, 200)
    return 2 * POSITIONS_PER_S * blocks + (((rest - 1) // 2 + 1 - 2) // 2 + 1 if rest else 0)


def read_shape(path: str) -> ModelShape:
    """The shape of the checkpoint folder or hub model at `path`; models of `PUBLISHED` are known without a network.

    Raises:
        UserError: no path, no such folder or model, or a kind of model that is not known here.
    """
    if not path:
        raise UserError("no model is named", remedy="set model.path=FOLDER or a hub name")
    content = PUBLISHED.get(path)
    if content is None:
        model_class(path)  # refuses what is not known
        content = read_json(path, "config.json")
    kind = content["model_type"]
    try:
        make = _omni if kind.startswith("qwen2_5_omni") else _salmonn
        return make(path, content)
    except UserError:
        raise
    except Exception as error:  # configuration classes raise many kinds at values they cannot use
        raise UserError(
            f"the config.json of {path} describes no {kind}: {type(error).__name__}: {error}".splitlines()[0],
            remedy=f"fetch it again; known types: {', '.join(MODELS)}",
        ) from error


def _omni(path: str, content: dict[str, Any]) -> ModelShape:
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    from omnimem_train.models.qwen2_5_omni import Parts

    inner = content.get("thinker_config", content)
    config: Any = Qwen2_5OmniThinkerConfig.from_dict(inner)
    with torch.device("meta"):
        module = Qwen2_5OmniThinkerForConditionalGeneration(config)
    parts = Parts.of(module)
    settings = Settings() if path in PUBLISHED else read_settings(path)
    shape = _shape(path, content, inner, config.text_config, module, parts.visual, parts.audio)
    return replace(shape, settings=settings)


def _salmonn(path: str, content: dict[str, Any]) -> ModelShape:
    from omnimem_train.models.salmonn.config import VideoSalmonn2Config
    from omnimem_train.models.salmonn.model import VideoSalmonn2ForConditionalGeneration
    from omnimem_train.models.salmonn.processor import picture_rules

    if path in PUBLISHED:
        config: Any = VideoSalmonn2Config(**{k: v for k, v in content.items() if k not in ("model_type", "dtype")})
    else:
        config = VideoSalmonn2Config.from_pretrained(path)
    with torch.device("meta"):
        module: Any = VideoSalmonn2ForConditionalGeneration(config)
    visual, audio = module.model.visual, module.model.audio
    deepstack = len(config.vision_config.deepstack_visual_indexes) if config.backbone == "qwen3_vl" else 0
    shape = _shape(path, content, content, config.text_config, module, visual, audio)
    return replace(shape, rules=picture_rules(config), decoder=replace(shape.decoder, deepstack=deepstack))


def _shape(
    path: str,
    content: dict[str, Any],
    inner: dict[str, Any],
    text: Any,
    module: nn.Module,
    visual: nn.Module,
    audio: nn.Module,
) -> ModelShape:
    decoder = DecoderShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        mlp=text.intermediate_size,
        vocabulary=text.vocab_size,
    )
    named = (part.get(key) for part in (inner, content) for key in ("dtype", "torch_dtype"))
    dtype = next((str(name) for name in named if name), "float32")
    return ModelShape(
        path=path,
        kind=content["model_type"],
        dtype=dtype.removeprefix("torch."),
        decoder=decoder,
        parameters=_numbers(module),
        vision=_numbers(visual),
        # the Q-Former of video-SALMONN 2+ sees one query a half second, which is little beside the encoder
        audio=sum(p.numel() for name, p in audio.named_parameters() if not name.startswith("qformer")),
    )


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
