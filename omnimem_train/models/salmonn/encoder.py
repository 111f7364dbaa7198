"""The encoder side of a video-SALMONN 2+ stream: windows of frames and samples in, tokens in the published order
out."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from omnimem_train.errors import UserError
from omnimem_train.memory.state import AUDIO, TEXT, VISUAL
from omnimem_train.models.decoder import DEEPSTACK
from omnimem_train.models.interface import MediaEncoder, MediaInfo, MediaWindow, TokenBlock
from omnimem_train.models.salmonn import media
from omnimem_train.models.salmonn.config import check_scheme
from omnimem_train.models.salmonn.decoder import VideoSalmonn2Decoder
from omnimem_train.models.salmonn.media import SAMPLING_RATE, WINDOW_S, Sampling
from omnimem_train.models.salmonn.order import Order, Rules
from omnimem_train.models.salmonn.positions import TICKS_PER_S
from omnimem_train.models.salmonn.processor import END, MAX_TIMESTAMPS, START, SYSTEM


class SalmonnEncoder(MediaEncoder):
    """One stream through the encoders of a video-SALMONN 2+.

    Tokens and positions are those of the processor and `get_rope_index` for one user message
    `{prefix}<video>{question}` whose frames were taken at k / fps. (The published pipeline spreads frames evenly from
    the first to the last, which a stream cannot know; seconds per pair are 2 / fps here.) Pictures are encoded pair
    by pair, sound in whole windows of 30 s, as the Whisper encoder needs; pictures wait for the sound that stands
    before them.

    A stream that ends inside a window of 30 s is padded with silence, and the padding gets tokens too, as for a file:
    60 a window in any case. `waiting` encodes an unfinished window in the same way for a question asked now.

    Args:
        model: whose encoders and tokenizer.
        info: which tracks the stream has, and how long it is announced to be (Qwen3-VL backbone: how many pairs share a
            timestamp; scheme `generation`: how many tokens the grid has).
        fps: frames a second; an odd last one is doubled.
        system: system prompt.
        prefix: text of the user message before the media.
        max_pixels: of a frame after resizing; published inference has 61,250.
        min_pixels: of a frame (of two frames with the Qwen3-VL backbone).
        max_timestamps: of the stream (Qwen3-VL backbone); with more frame pairs, neighbours share one.
        position_scheme: None for the configuration's.

    Raises:
        UserError: an option that cannot be used.
    """

    def __init__(
        self,
        model: VideoSalmonn2Decoder,
        info: MediaInfo,
        fps: float,
        *,
        system: str = SYSTEM,
        prefix: str = "",
        max_pixels: int = 61250,
        min_pixels: int = 784,
        max_timestamps: int = MAX_TIMESTAMPS,
        position_scheme: str | None = None,
    ) -> None:
        if info.has_video and not fps > 0:
            raise UserError(f"fps is {fps}", cause="a video needs frames", remedy="give a number above 0, e.g. 1")
        limits = (max_pixels, min_pixels, max_timestamps)
        if any(type(n) is not int or n < 1 for n in limits) or min_pixels > max_pixels:
            raise UserError(
                f"min_pixels {min_pixels}, max_pixels {max_pixels}, max_timestamps {max_timestamps}",
                remedy="give whole numbers, 1 or more, and a minimum below the maximum",
            )
        self.model, self.info, self.fps = model, info, fps
        config = model.config
        self.rules_of_pictures = model.processor.rules
        # Two frames at the maximum of two: the limits hold for each frame, short streams are not shown larger.
        self.sampling = Sampling(1.0, 1, 2, max_pixels, min_pixels)
        self.timestamped = config.backbone == "qwen3_vl" and info.has_video
        pairs = math.ceil(math.ceil(info.duration_s * fps - 1e-6) / 2) if info.has_video else 0
        rules = Rules(
            scheme=check_scheme(config.backbone, position_scheme or config.position_scheme),
            has_video=info.has_video,
            has_audio=info.has_audio,
            seconds_per_pair=2 / fps if info.has_video else 0.0,
            total_pairs=pairs,
            group=max(1, math.ceil(pairs / max_timestamps)) if self.timestamped else 1,
        )
        opening = model.encode(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{prefix}", system, prefix)
        has_media = info.has_video or info.has_audio
        self._opening = opening + (model.encode(START) if has_media and not self.timestamped else [])
        self._closing = model.encode(END) if has_media else []
        self.order, self._opening_positions = Order(rules).text(len(self._opening))
        layers = len(config.vision_config.deepstack_visual_indexes) if config.backbone == "qwen3_vl" else 0
        width = model.hidden_size
        self.frames = torch.zeros(0, 3, 0, 0, dtype=torch.uint8)  # resized, waiting for the other of their pair
        self.n_frames = 0
        self.samples = torch.zeros(0)  # waiting for the rest of their window
        # pairs, tokens, rows and deepstack features, E
        self.pictures = torch.zeros(0, 0, 1 + layers, width, dtype=model.dtype, device=model.device)
        self.sounds = torch.zeros(0, width, dtype=model.dtype, device=model.device)
        self._ended: tuple[Order, TokenBlock | None] | None = None

    def start(self) -> TokenBlock:
        """System prompt, the user message's beginning, the opening mark (with timestamps it follows the first one)."""
        return self._block(self.model.embed(self._opening), self._opening_positions, TEXT, torch.tensor(0.0))

    def push(self, window: MediaWindow) -> TokenBlock | None:
        """The tokens that `window` completes; None while there are none yet.

        Raises:
            ValueError: a window that does not hold what `MediaWindow` promises.
        """
        self._ended = None
        if self.info.has_video:
            self._push_frames(window)
        if self.info.has_audio:
            self._push_samples(window)
        return self._leave()

    def finish(self) -> TokenBlock | None:
        """The tokens that were waiting for more input when the stream ended."""
        self._ended = None
        self._encode_pairs(end=True)
        self._encode_sound(end=True)
        self._end(video=True, audio=True)
        return self._leave()

    def waiting(self) -> TokenBlock | None:
        """The tokens that `finish` would give now. Leaves the encoder as it is."""
        return self._as_if_ended()[1]

    def text(self, ids: Tensor, *, closing: bool = True) -> TokenBlock:
        """Text as if the stream ended here: the closing mark (unless none is open or `closing` is off), then `ids`
        (n,). Leaves the encoder as it is."""
        order = self._as_if_ended()[0]
        marked = closing and (not self.timestamped or order.pairs > 0)
        every = (self._closing if marked else []) + torch.as_tensor(ids).tolist()
        _, index = order.text(len(every))
        return self._block(self.model.embed(every), index, TEXT, self._now(order))

    def snapshot(self) -> dict[str, Tensor]:
        """What a new encoder needs to go on from here, as tensors."""
        return {
            "order": self.order.snapshot(),
            "frames": self.frames,
            "n_frames": torch.tensor(self.n_frames),
            "samples": self.samples,
            "pictures": self.pictures,
            "sounds": self.sounds,
        }

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Go on from `snapshot`, in an encoder opened with the same arguments."""
        self._ended = None
        self.order = self.order.restored(snapshot["order"])
        self.frames, self.samples = snapshot["frames"].cpu(), snapshot["samples"].cpu()
        self.n_frames = int(snapshot["n_frames"])
        self.pictures = snapshot["pictures"].to(self.model.device)
        self.sounds = snapshot["sounds"].to(self.model.device)

    def _as_if_ended(self) -> tuple[Order, TokenBlock | None]:
        """Order and tokens after `finish`; remembered until the next window."""
        if self._ended is None:
            ended = copy.copy(self)  # all that changes is replaced, never written into
            block = ended.finish()
            self._ended = (ended.order, block)
        return self._ended

    # pictures and sound ----------------------------------------------------------------------------------------------

    def _push_frames(self, window: MediaWindow) -> None:
        count = 0 if window.frames is None else len(window.frames)
        if count and self.order.video_ended:
            raise ValueError(f"the window at {window.start_s:g} s brings frames after the picture had ended")
        if count and window.frames is not None:
            frames = torch.from_numpy(window.frames).permute(0, 3, 1, 2)
            size = media.resized(frames.shape[2], frames.shape[3], 2, self.sampling, self.rules_of_pictures)
            new = media.resize(frames, size)
            self.frames = torch.cat([self.frames, new]) if len(self.frames) else new
            self.n_frames += count
        # Fewer frames than the window has room for: the picture is shorter than the sound and holds it back no longer.
        short = self.n_frames < math.ceil(window.end_s * self.fps - 1e-6)
        self._encode_pairs(end=short)
        self._end(video=short)

    def _push_samples(self, window: MediaWindow) -> None:
        expected = round((window.end_s - window.start_s) * SAMPLING_RATE)
        found = -1 if window.samples is None else len(window.samples)
        if not 0 <= found <= expected:
            raise ValueError(f"the window at {window.start_s:g} s holds {found} samples, it should hold {expected}")
        if found and self.order.audio_ended:
            raise ValueError(f"the window at {window.start_s:g} s brings samples after the sound had ended")
        self.samples = torch.cat([self.samples, torch.as_tensor(window.samples, dtype=torch.float32)])
        # Fewer samples than the window has room for: the sound is shorter than the picture and holds it back no longer.
        short = found < expected
        self._encode_sound(end=short)
        self._end(audio=short)

    @torch.no_grad()
    def _encode_pairs(self, end: bool) -> None:
        """Whole pairs through the vision tower; at the end an odd frame is doubled."""
        pairing, merge = self.rules_of_pictures.pairing, self.rules_of_pictures.merge
        whole = len(self.frames) if end else len(self.frames) // pairing * pairing
        if whole == 0:
            return
        pixels, (t, h, w) = media.patches(self.frames[:whole], self.rules_of_pictures)
        self.frames = self.frames[whole:]
        made = self.model.encode_pictures(pixels, (t, h, w)).unflatten(0, (t, -1))
        self.pictures = torch.cat([self.pictures, made]) if len(self.pictures) else made
        self.order = replace(self.order, rows=h // merge, columns=w // merge)

    @torch.no_grad()
    def _encode_sound(self, end: bool) -> None:
        """Whole windows of 30 s through the audio encoder; at the end the rest too, padded with silence."""
        step = WINDOW_S * SAMPLING_RATE
        whole = len(self.samples) if end else len(self.samples) // step * step
        if whole == 0:
            return
        mel = self.model.processor.log_mel(self.samples[:whole].numpy())
        self.samples = self.samples[whole:]
        for window in mel:
            self.sounds = torch.cat([self.sounds, self.model.encode_sound(window[None])])

    def _end(self, *, video: bool = False, audio: bool = False) -> None:
        order = self.order
        self.order = replace(order, video_ended=order.video_ended or video, audio_ended=order.audio_ended or audio)

    # tokens ----------------------------------------------------------------------------------------------------------

    def _leave(self) -> TokenBlock | None:
        """All tokens whose turn it is."""
        out: list[TokenBlock] = []
        while True:
            kind, n = self.order.next(self.order.pairs + len(self.pictures), self.order.sounds + len(self.sounds))
            if not kind:
                return TokenBlock.cat(out) if out else None
            if kind == "audio":
                out.append(self._leave_sound(n))
                continue
            if self.timestamped and self.order.pairs % self.order.rules.group == 0:
                out.append(self._leave_marks())
            out.append(self._leave_pair())

    def _leave_pair(self) -> TokenBlock:
        rows, self.pictures = self.pictures[0], self.pictures[1:]
        time_s = torch.tensor(self.order.pairs * self.order.rules.seconds_per_pair)
        self.order, index = self.order.pair()
        return self._block(rows[:, 0], index, VISUAL, time_s, rows[:, 1:])

    def _leave_sound(self, n: int) -> TokenBlock:
        rows, self.sounds = self.sounds[:n], self.sounds[n:]
        time_s = torch.arange(self.order.sounds, self.order.sounds + n) / TICKS_PER_S
        self.order, index = self.order.audio(n)
        return self._block(rows, index, AUDIO, time_s)

    def _leave_marks(self) -> TokenBlock:
        """The mark that closes the bracket before, the time of the next pair as text, the mark that opens its
        bracket."""
        first = self.order.pairs * self.rules_of_pictures.pairing
        last = min(first + self.rules_of_pictures.pairing - 1, self.n_frames - 1)
        text = f"<{(first / self.fps + last / self.fps) / 2:.1f} seconds>{START}"
        ids = self.model.encode((END if self.order.pairs else "") + text)
        time_s = torch.tensor(self.order.pairs * self.order.rules.seconds_per_pair)
        self.order, index = self.order.text(len(ids))
        return self._block(self.model.embed(ids), index, TEXT, time_s)

    def _now(self, order: Order) -> Tensor:
        """Seconds of stream that have left."""
        return torch.tensor(max(order.pairs * order.rules.seconds_per_pair, order.sounds / TICKS_PER_S))

    def _block(
        self, embeds: Tensor, index: Tensor, modality: int, time_s: Tensor, features: Tensor | None = None
    ) -> TokenBlock:
        """(n, E) with (n, 3) positions, times (n,) or one for all, and deepstack features (n, layers, E), 0 if None."""
        n, device, layers = len(embeds), self.model.device, self.pictures.shape[2] - 1
        extras: dict[str, Tensor] = {}
        if layers:
            none = torch.zeros(n, layers, embeds.shape[-1], dtype=embeds.dtype, device=device)
            extras[DEEPSTACK] = (none if features is None else features)[None]
        return TokenBlock(
            embeds[None],
            index[None].to(device),
            torch.full((1, n), modality, dtype=torch.int8, device=device),
            time_s.float().expand(n)[None].to(device),
            extras,
        )
