"""A LoRA step on a decoder in 4 bits, with the memory of the device capped as on a GPU of 24 GiB."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from cases import Bench, clear, encoded, release, with_lora
from measure import GIB
from shape import SHAPES, Shape, fill, make_thinker
from torch import nn

from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig
from omnimem_train.models.interface import StreamingModel
from omnimem_train.models.lora import LoraSettings
from omnimem_train.models.preprocess import Settings
from omnimem_train.models.quantised import mark, pack_linears
from omnimem_train.models.qwen2_5_omni import Parts, Qwen2_5OmniStreaming
from omnimem_train.models.shape import read_shape
from omnimem_train.models.tiny import tiny_tokenizer
from omnimem_train.step import StreamingStep

LIMIT_GIB = 24.0
PUBLISHED = "Qwen/Qwen2.5-Omni-7B"


def make_packed_model(
    shape: Shape, device: torch.device, dtype: torch.dtype, attention: str = "sdpa"
) -> StreamingModel:
    """As `shape.make_model`, with the decoder in 4 bits: layer by layer, so that the device holds one unpacked layer at
    a time. Its towers have no numbers in their buffers; they are not run."""
    module = make_thinker(shape, torch.device("meta"), dtype)
    text = Parts.of(module).text
    layers, text.layers = text.layers, nn.ModuleList()
    module.to_empty(device=device)
    text.rotary_emb = type(text.rotary_emb)(text.config).to(device)
    fill(module)
    for i, layer in enumerate(layers):
        if any(True for _ in layer.buffers()):
            raise RuntimeError("the layers of this version of transformers have buffers, which would stay empty")
        layer.to_empty(device=device)
        fill(layer, seed=1 + i)
        pack_linears(layer, device)
    text.layers = layers
    module.eval().requires_grad_(False)
    model = Qwen2_5OmniStreaming(module, tiny_tokenizer(), Settings(), attention)
    mark(model)
    return model


@contextmanager
def capped(device: torch.device, limit_gib: float) -> Iterator[None]:
    """Inside, torch takes no more of a GPU than what `limit_gib` leaves beside what CUDA holds itself."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.mem_get_info(device)[1]
    share = min(1.0, (limit_gib * GIB - outside(device)) / total)
    torch.cuda.set_per_process_memory_fraction(share, device.index)  # takes no device without an index
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)


def outside(device: torch.device) -> int:
    """Bytes of a GPU that are taken, but not by torch's allocator."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def packed_step(bench: Bench, name: str, gradient: Gradient, *, whole: bool = False) -> None:
    """A step under the cap; if it does not fit there, without one, so that the table says what it takes.

    Args:
        whole: hold as many bytes as a run has beside: the published model's towers, which the bench's model lacks, and
            the moments of AdamW.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        print(f"{name}: bitsandbytes is not installed")
        return
    release(bench)
    own = dataclasses.replace(bench)
    own.__dict__["model"] = make_packed_model(own.shape, own.device, own.dtype, own.attention)
    beside = bytes_beside(own.shape) if whole else 0
    held = torch.empty(beside, dtype=torch.uint8, device=own.device)
    try:
        if not under_cap(own, name, gradient):
            own.clock.clean()
            measure(own, name, gradient, note=f"does not fit into {LIMIT_GIB:g} GiB; measured without the cap")
    finally:
        del held
        release(own)


def under_cap(bench: Bench, name: str, gradient: Gradient) -> bool:
    """`measure` under the cap; False if it does not fit there."""
    try:
        with capped(bench.device, LIMIT_GIB):
            measure(bench, name, gradient)
    except torch.OutOfMemoryError as error:
        print(f"{name}: {str(error).splitlines()[0][:200]}")
        return False
    return True


def measure(bench: Bench, name: str, gradient: Gradient, note: str = "") -> None:
    """Seconds of a step on the whole stream, its peak of allocated memory, and of what the whole process takes of the
    GPU."""
    parameters, shape, clock = with_lora(bench), bench.shape, bench.clock
    step, spec = StreamingStep(bench.model, LossConfig()), bench.spec("perturbation")

    def run(tokens: int) -> None:
        try:
            step(encoded(bench, tokens), spec, gradient).loss.backward()
        finally:
            clear(parameters)

    short = min(shape.tokens, (-(-shape.budget // shape.chunk) + 2) * shape.chunk)
    run(short)  # warms up, compiles kernels
    expected_s = clock.once(lambda: run(short)) * shape.tokens / short
    if expected_s > clock.left_s:
        return bench.add(name, [expected_s], note=f"extrapolated from {short} tokens; {note}".rstrip("; "))
    taken = list[float]()
    peak_gib = clock.peak_gib(lambda: taken.append(clock.once(lambda: run(shape.tokens))))
    taken += [clock.once(lambda: run(shape.tokens)) for _ in range(bench.reps - 1) if clock.left_s > taken[0]]
    bench.add(name, taken, note=note)
    bench.add_peak(name, peak_gib, LIMIT_GIB)
    if bench.device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(bench.device)
        value = (reserved + outside(bench.device)) / GIB
        bench.results.add(f"{name}.device{bench.suffix}", value, "GiB", goal=LIMIT_GIB, note=note)
    return None


def bytes_beside(shape: Shape) -> int:
    """Bytes that a run on the published model of this size has, and the bench has not; 0 for small shapes."""
    if shape.size != SHAPES["qwen2.5-omni-7b"].size:
        return 0
    moments = 8 * shape.decoder.adapter_weights(shape.rank, LoraSettings().targets)
    return 2 * (read_shape(PUBLISHED).parameters - shape.parameters) + moments


def alone(bench: Bench) -> None:
    """The decoder by itself, as in all other cases."""
    packed_step(bench, "lora.all_nf4", Gradient("all"))


def whole_run(bench: Bench) -> None:
    """With all that a run has beside the decoder, and what waits for the backward pass in host memory: on the device it
    would not fit."""
    if "offload" not in {field.name for field in dataclasses.fields(Gradient)}:
        print("lora.all_nf4_whole: this version keeps everything on the device")
        return
    packed_step(bench, "lora.all_nf4_whole", Gradient("all", offload="host"), whole=True)


QUANTISED_CASES: dict[str, Callable[[Bench], None]] = {"lora_all_nf4": alone, "lora_all_nf4_whole": whole_run}
