"""The encoder side of a Qwen2.5-Omni stream: windows of frames and samples in, tokens in stock order out."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from omnimem_train.errors import UserError
from omnimem_train.memory.state import TEXT
from omnimem_train.models.interface import MediaEncoder, MediaInfo, MediaWindow, TokenBlock
from omnimem_train.models.layout import Layout, Waiting
from omnimem_train.models.preprocess import MelStream, Settings, patchify, resize, scale_log_mel, smart_resize

SYSTEM = "You are a helpful assistant."  # of the published chat template
MEL_BLOCK = 200  # mel frames of 2 s: the audio tower attends inside such blocks


class Towers(Protocol):
    """What an encoder asks of the model."""

    hidden_size: int

    @property
    def dtype(self) -> torch.dtype:
        """Of embeddings."""

    @property
    def device(self) -> torch.device:
        """Where the towers are."""

    def video_settings(self, min_pixels: int | None = None, max_pixels: int | None = None) -> Settings:
        """The checkpoint's preprocessing with other pixel limits where given."""

    def encode(self, text: str, *written_by_users: str) -> list[int]:
        """Token ids of `text`, of which some parts were written by users."""

    def token_ids(self, tokens: list[str]) -> list[int]:
        """Ids of control tokens."""

    def embed(self, ids: Tensor) -> Tensor:
        """(n,) ids to (n, E)."""

    def encode_pictures(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Patches and their grid to (tokens, E)."""

    def encode_sound(self, log_mel: Tensor) -> Tensor:
        """Scaled log-mel (mels, f) to (tokens, E)."""


class OmniEncoder(MediaEncoder):
    """One stream through the towers of a Qwen2.5-Omni.

    The tokens are those of the stock chat template, processor and `get_rope_index` for one user message
    `{prefix}<video>{question}` with the sound in the video, or with a silent video, sound alone or text alone. Both
    towers run window by window and give what they give on the whole file: the vision tower never attends across
    temporal patches, the audio tower attends inside blocks of 2 s.

    A mel frame reads 12.5 ms of sound after its centre, so the last 2 s of sound pushed are always waiting for the next
    window (or `finish`); below 1 frame a second some more waits for the picture that precedes it. `waiting`
    gives it, encoded as if the file ended there, for questions asked now.

    Args:
        model: whose towers and tokenizer.
        info: which tracks the stream has.
        fps: frames a second; two make a temporal patch of 2 / fps seconds, an odd last one is doubled.
        system: system prompt.
        prefix: text of the user message before the media.
        min_pixels, max_pixels: of a frame after resizing; None for the checkpoint's.
        mel_floor: what stands for the loudest log10 mel value of the clip, 8 decades below which the stock extractor
            cuts off. A stream does not know its loudest moment: "running" takes the loudest so far (at the end of
            each 2 s block), which differs from the stock features only in near-silent bands before that moment. A
            number (`peak_log_mel` of the sound, one pass: what the model's `prepass` does) gives the stock features
            exactly.

    Raises:
        UserError: an option that cannot be used.
    """

    def __init__(
        self,
        model: Towers,
        info: MediaInfo,
        fps: float,
        *,
        system: str = SYSTEM,
        prefix: str = "",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        mel_floor: float | str = "running",
    ) -> None:
        if info.has_video and not fps > 0:
            raise UserError(f"fps is {fps}", cause="a video needs frames", remedy="give a number above 0, e.g. 2")
        if mel_floor != "running" and not (isinstance(mel_floor, int | float) and math.isfinite(mel_floor)):
            raise UserError(f"mel_floor is {mel_floor!r}", remedy="give 'running' or a number from peak_log_mel")
        self.model, self.info, self.fps = model, info, fps
        self.settings = model.video_settings(min_pixels, max_pixels)
        self.mel_floor = mel_floor
        self._opening = model.encode(
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{prefix}", system, prefix
        )
        both = info.has_video and info.has_audio
        marks = int(info.has_video or info.has_audio)  # two opening marks share one position
        self.layout = Layout(
            start=len(self._opening) + marks,
            patch_s=self.settings.pairing / fps if info.has_video else 0.0,
            has_video=info.has_video,
            has_audio=info.has_audio,
            interleaved=both,
            waiting=Waiting.none(model.hidden_size, model.dtype, model.device),
        )
        self.mel = MelStream(self.settings)
        self.mel_held = torch.zeros(self.settings.mels, 0)
        self.peak = torch.tensor(-math.inf if mel_floor == "running" else float(mel_floor))
        self.size = (0, 0)  # of resized frames, known with the first
        self.frames = torch.zeros(0, 3, 0, 0, dtype=torch.uint8)  # resized, waiting for the rest of their patch
        self.n_frames = 0
        self._ended: tuple[Layout, TokenBlock | None] | None = None

    @property
    def opening_ids(self) -> list[int]:
        """Ids of the tokens that `start` gives."""
        return [*self._opening, *self._marks("bos")]

    @property
    def closing_ids(self) -> list[int]:
        """Ids of the marks that `text` puts in front."""
        return self._marks("eos")

    def start(self) -> TokenBlock:
        """System prompt, the user message's beginning, opening marks."""
        return self._text_block(self._opening, self._marks("bos"), 0, 0.0)

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
        self._encode_frames(end=True)
        if self.layout.has_audio:
            self._encode_mel(self.mel.finish(), end=True)
        self.layout = self.layout.ended()
        return self._leave()

    def waiting(self) -> TokenBlock | None:
        """The tokens that `finish` would give now, encoded as if the file ended here. Leaves the encoder as it is."""
        return self._as_if_ended()[1]

    def text(self, ids: Tensor, *, closing: bool = True) -> TokenBlock:
        """Text as if the stream ended here: closing marks (unless none are open or `closing` is off), then `ids` (n,),
        with positions after what is `waiting`. Leaves the encoder as it is."""
        where = self._as_if_ended()[0]
        marks = self._marks("eos") if closing else []
        return self._text_block(ids, marks, where.next_position, where.time_s, marks_first=True)

    def _as_if_ended(self) -> tuple[Layout, TokenBlock | None]:
        """The layout after `finish`, and the tokens that gives; remembered until the next window."""
        if self._ended is None:
            ended = copy.copy(self)
            ended.mel = copy.copy(self.mel)
            block = ended.finish()
            self._ended = (ended.layout, block)
        return self._ended

    def snapshot(self) -> dict[str, Tensor]:
        """What a new encoder needs to go on from here, as tensors."""
        return {f"layout.{k}": v for k, v in self.layout.snapshot().items()} | {
            "mel.held": self.mel.held,
            "mel.numbers": torch.tensor([self.mel.n_samples, self.mel.n_frames]),
            "mel_held": self.mel_held,
            "peak": self.peak,
            "frames": self.frames,
            "numbers": torch.tensor([*self.size, self.n_frames]),
        }

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Go on from `snapshot`, in an encoder opened with the same arguments."""
        self._ended = None
        part = {k.removeprefix("layout."): v for k, v in snapshot.items() if k.startswith("layout.")}
        self.layout = self.layout.restored(part)
        self.mel.held = snapshot["mel.held"].cpu()
        self.mel.n_samples, self.mel.n_frames = (int(x) for x in snapshot["mel.numbers"])
        self.mel_held, self.peak = snapshot["mel_held"].cpu(), snapshot["peak"].cpu()
        self.frames = snapshot["frames"].cpu()
        height, width, self.n_frames = (int(x) for x in snapshot["numbers"])
        self.size = (height, width)

    # pictures --------------------------------------------------------------------------------------------------------

    def _push_frames(self, window: MediaWindow) -> None:
        count = 0 if window.frames is None else len(window.frames)
        if count and not self.layout.has_video:
            raise ValueError(f"the window at {window.start_s:g} s brings frames after the picture had ended")
        if count and window.frames is not None:
            frames = torch.from_numpy(window.frames)
            if self.n_frames == 0:
                height, width = frames.shape[1:3]
                self.size = (height, width) if window.shrunk else smart_resize(height, width, self.settings)
                self.frames = torch.zeros(0, 3, *self.size, dtype=torch.uint8)
            self.frames = torch.cat([self.frames, resize(frames, *self.size)])
            self.n_frames += count
        # fewer frames than the window has room for: the picture is shorter than the sound and holds it back no longer
        short = self.n_frames < math.ceil(window.end_s * self.fps - 1e-6)
        self._encode_frames(end=short)
        if short:
            self.layout = self.layout.ended(audio=False)

    @torch.no_grad()
    def _encode_frames(self, end: bool) -> None:
        """Whole temporal patches through the vision tower; at the end an odd frame is doubled."""
        pairing, merge = self.settings.pairing, self.settings.merge
        if end and (missing := -len(self.frames) % pairing):
            self.frames = torch.cat([self.frames, self.frames[-1:].expand(missing, -1, -1, -1)])
        whole = len(self.frames) // pairing * pairing
        if whole == 0:
            return
        patches, grid = patchify(self.frames[:whole].to(self.model.device), self.settings)
        self.frames = self.frames[whole:]
        embeds = self.model.encode_pictures(patches, grid)
        self.layout = self.layout.add_pictures(embeds, grid[0], grid[1] // merge, grid[2] // merge)

    # sound -----------------------------------------------------------------------------------------------------------

    def _push_samples(self, window: MediaWindow) -> None:
        expected = round((window.end_s - window.start_s) * self.settings.sampling_rate)
        found = -1 if window.samples is None else len(window.samples)
        if not 0 <= found <= expected:
            raise ValueError(f"the window at {window.start_s:g} s holds {found} samples, it should hold {expected}")
        if found and not self.layout.has_audio:
            raise ValueError(f"the window at {window.start_s:g} s brings samples after the sound had ended")
        assert window.samples is not None
        self._encode_mel(self.mel.push(window.samples), end=False)
        if found < expected and self.layout.has_audio:  # the sound is shorter than the picture: hold it back no longer
            self._encode_mel(self.mel.finish(), end=True)
            self.layout = self.layout.ended(video=False)

    @torch.no_grad()
    def _encode_mel(self, log_mel: Tensor, end: bool) -> None:
        """Whole blocks of 2 s through the audio tower; at the end also the rest."""
        held = torch.cat([self.mel_held, log_mel], dim=1)
        whole = held.shape[1] if end else held.shape[1] // MEL_BLOCK * MEL_BLOCK
        self.mel_held = held[:, whole:]
        if whole == 0:
            return
        scaled = []
        for block in held[:, :whole].split(MEL_BLOCK, dim=1):
            if self.mel_floor == "running":
                self.peak = torch.maximum(self.peak, block.max())
            scaled.append(scale_log_mel(block, self.peak))
        self.layout = self.layout.add_sound(self.model.encode_sound(torch.cat(scaled, dim=1)))

    # tokens ----------------------------------------------------------------------------------------------------------

    def _leave(self) -> TokenBlock | None:
        self.layout, out = self.layout.take()
        if len(out) == 0:
            return None
        device = self.model.device
        tensors = (x[None].to(device) for x in (out.embeds, out.positions, out.modality, out.time_s))
        embeds, positions, modality, time_s = tensors
        return TokenBlock(embeds, positions, modality, time_s)

    def _marks(self, which: str) -> list[int]:
        """Opening ("bos") or closing ("eos") marks; of two, the outer one is that of vision."""
        kinds = [name for name, there in (("vision", self.info.has_video), ("audio", self.info.has_audio)) if there]
        kinds = kinds if which == "bos" else kinds[::-1]
        return self.model.token_ids([f"<|{kind}_{which}|>" for kind in kinds])

    def _text_block(
        self, ids: Tensor | list[int], marks: list[int], start: int, time_s: float, *, marks_first: bool = False
    ) -> TokenBlock:
        """Text and marks from position `start` on; the marks, one or two, share one position."""
        text = torch.as_tensor(ids, dtype=torch.int64).cpu()
        mark = torch.tensor(marks, dtype=torch.int64)
        shared = int(bool(marks))
        if marks_first:
            every, at = torch.cat([mark, text]), [0] * len(marks) + list(range(shared, shared + len(text)))
        else:
            every, at = torch.cat([text, mark]), list(range(len(text))) + [len(text)] * len(marks)
        n, device = len(every), self.model.device
        positions = (torch.tensor(at, dtype=torch.int64) + start).to(device)
        return TokenBlock(
            self.model.embed(every.to(device))[None],
            positions[None, :, None].expand(1, n, 3),
            torch.full((1, n), TEXT, dtype=torch.int8, device=device),
            torch.full((1, n), time_s, dtype=torch.float32, device=device),
        )
