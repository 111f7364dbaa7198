"""What a step stores in host memory: the same numbers to the bit, nothing left on the device, copies ahead of use."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import omni_clips
import pytest
import torch
from torch import Tensor
from toy import ToyModel, toy_question, toy_stream

from omnimem_train.chunk import ChunkInputs
from omnimem_train.errors import UserError
from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig
from omnimem_train.memory.spec import MemorySpec
from omnimem_train.models.interface import StreamingModel, Tap, TokenBlock, Turn
from omnimem_train.models.lora import LoraSettings, add_lora, lora_parameters
from omnimem_train.offload import HostMemory, Parked, Slabs, host_memory
from omnimem_train.run_config import MAY_CHANGE
from omnimem_train.step import EncodedStream, StreamingStep, TimedTurn, encode_stream
from omnimem_train.streaming import Stream

SPEC = MemorySpec(selector="perturbation", budget=9, chunk_tokens=7)
CPU = torch.device("cpu")
SLAB = 1024


class Logged(HostMemory):
    """Copies as on a GPU, into plain host memory. `log` says what happened when, by the number of what was parked."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.slabs = Slabs(pinned=False, size=SLAB)
        self.log: list[tuple[str, int]] = []
        self.parked: list[Parked] = []

    def park(self, tensors: Sequence[Tensor | None]) -> Parked:
        found = super().park(tensors)
        self.log.append(("park", len(self.parked)))
        self.parked.append(found)
        return found

    def fetch(self, joined: Any, after: Any) -> tuple[list[Tensor], Any]:
        number = next(i for i, p in enumerate(self.parked) if p.joined is joined)
        self.log.append(("fetch", number))
        found = super().fetch(joined, after)
        for part in joined:
            for piece in part.pieces:
                piece.fill_(0xFF)  # its place may be taken from now on
        return found


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Logged]:
    """A host memory that the CPU is made to use."""
    found = Logged()
    for module in ("streaming", "step"):
        monkeypatch.setattr(f"omnimem_train.{module}.host_memory", lambda _: found)
    return found


# The pieces -----------------------------------------------------------------------------------------------------------


def mixed() -> list[Tensor | None]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 3, 50, generator=g),
        None,
        torch.arange(7, dtype=torch.int16),
        torch.randn(4, 30, generator=g, dtype=torch.float64).t(),
        torch.zeros(2, 0, 3),
        torch.randn(999, generator=g).bfloat16(),
        torch.tensor(3, dtype=torch.int8),
    ]


def test_parked_tensors_come_back_as_they_were() -> None:
    memory, tensors = HostMemory(CPU), mixed()
    memory.slabs = Slabs(pinned=False, size=256)
    first, second = memory.park(tensors), memory.park(tensors[::-1])
    second.fetch()
    second.fetch()  # a second time changes nothing
    for parked, wanted in ((first, tensors), (second, tensors[::-1])):
        for a, b in zip(parked.get(), wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert a.dtype == b.dtype and torch.equal(a, b)
                assert a.data_ptr() != b.data_ptr() or not a.numel()


def test_pieces_do_not_overlap_and_fill_slabs() -> None:
    slabs = Slabs(pinned=False, size=256)
    pieces = [piece for n in (100, 300, 1, 0, 64) for piece in slabs.pieces(n)]
    assert [p.numel() for p in pieces] == [100, 128, 172, 1, 64]
    places = sorted((p.data_ptr(), p.data_ptr() + p.numel()) for p in pieces)
    assert all(end <= start for (_, end), (start, _) in pairwise(places))
    assert len({p.untyped_storage().data_ptr() for p in pieces}) == 3


def test_room_for_a_tensor_is_in_one_piece() -> None:
    slabs = Slabs(pinned=False, size=256)
    rooms = [slabs.like(torch.empty(*shape)) for shape in ((3, 10), (5, 9), (100,), (0, 4), (2,))]
    assert [tuple(r.shape) for r in rooms] == [(3, 10), (5, 9), (100,), (0, 4), (2,)]
    for i, room in enumerate(rooms):
        room.fill_(i)
    assert all(bool((room == i).all()) for i, room in enumerate(rooms))


def test_too_little_host_memory_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(UserError, match=r"64 MiB more of pinned host memory"):
        Slabs(pinned=True).pieces(5)


def test_a_cpu_has_nothing_to_move() -> None:
    assert host_memory(CPU) is None


def test_settings() -> None:
    with pytest.raises(UserError, match="unknown gradient offload 'gpu'"):
        Gradient(offload="gpu")
    with pytest.raises(UserError, match=r"offload=host without gradient.checkpointing"):
        Gradient(offload="host", checkpointing=False)
    assert "config.gradient.offload" in MAY_CHANGE


# The same numbers -----------------------------------------------------------------------------------------------------


class WithExtras(ToyModel):
    """Extras are added to the output of the first layer."""

    def run_layer(self, layer: int, hidden: Tensor, rope: Any, tap: Tap, extras: Mapping[str, Tensor]) -> Tensor:
        out = super().run_layer(layer, hidden, rope, tap, extras)
        return out + extras["seen"] if layer == 0 and "seen" in extras else out


def media_of(batch: int, seed: int = 0) -> TokenBlock:
    media = TokenBlock.stack([toy_stream(45, seed=seed + s) for s in range(batch)])
    seen = torch.randn(media.embeds.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return replace(media, extras={"seen": seen})


def question(batch: int, seed: int) -> TokenBlock:
    block = toy_question(4, 60, seed=seed, batch=batch)
    return replace(block, extras={"seen": torch.zeros_like(block.embeds)})


def results(gradient: Gradient, spec: MemorySpec, batch: int = 1, of_input: bool = False) -> list[Tensor]:
    """Losses of questions asked in the middle of a stream, on branches of it, and at its end; then gradients, of two
    streams one after the other."""
    model, losses, inputs = WithExtras(), list[Tensor](), list[Tensor]()
    for number in range(2):
        media, start = media_of(batch, seed=9 * number), 0
        if of_input:
            inputs += [media.embeds.requires_grad_(), media.extras["seen"].requires_grad_()]
        stream, asked = Stream(model, spec, gradient, media.n), []
        state = stream.start(batch)
        for end in (16, 21, 31, 45):  # in the middle of a chunk, between two, in the middle
            state = stream.feed(state, media[start:end])
            if end == media.n:
                state = stream.flush(state)
            hidden = stream.ask(stream.caught_up(state), [question(batch, q) for q in range(2)])
            asked.append(model.logits(hidden).log_softmax(-1)[..., 3].sum())
            start = end
        del state, hidden
        gc.collect()
        losses.append(torch.stack(asked).sum())
        losses[-1].backward()
    grads = [*(p.grad for p in model.module.parameters() if p.grad is not None), *(x.grad for x in inputs)]
    return [*(x.detach() for x in losses), *(g for g in grads if g is not None)]


GRADIENTS = [Gradient("all"), Gradient("last", chunks=3), Gradient("stop_layer", layer=1)]
SPECS = {
    "undone": SPEC,
    "compact": SPEC.replace(positions="compact"),
    "with layer inputs": SPEC.replace(selector="omnimem"),
    "unlimited": SPEC.replace(budget=None),
    "by layer": SPEC.replace(layer_table=(4, [1, 9], 12)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda g: g.kind)
@pytest.mark.parametrize("granularity", ["chunk", "layer"])
@pytest.mark.parametrize("batch", [1, 2])
def test_losses_and_gradients_are_the_same_to_the_bit(
    batch: int, granularity: str, gradient: Gradient, spec: MemorySpec, host: Logged
) -> None:
    plain = results(gradient, spec, batch)
    assert not host.log
    found = results(replace(gradient, offload="host", granularity=granularity), spec, batch)
    assert ("park", 2) in host.log
    assert len(found) == len(plain) > 20
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_gradients_of_embeddings_and_extras_too(host: Logged) -> None:
    plain, found = (results(Gradient(offload=o), SPEC, of_input=True) for o in ("none", "host"))
    assert host.log and len(found) == len(plain)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_memories_come_back(host: Logged) -> None:
    media = toy_stream(45)
    for spec in SPECS.values():
        stream = Stream(ToyModel(), spec, Gradient(offload="host"), media.n)
        state, found = stream.start(), []
        for start in range(0, media.n, 7):
            state = stream.flush(stream.feed(state, media[start : start + 7]))
            found.append((state.past, state.layers))
        for past, layers in reversed(found):
            assert past is not None
            for a, b in zip(past.restore(), layers, strict=True):
                assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


# What is where, and when ----------------------------------------------------------------------------------------------


def stored(graph_end: Tensor) -> list[Any]:
    """What the chunks of a graph hold for their second pass, the newest first."""
    found, todo, seen = [], [graph_end.grad_fn], set()
    while todo:
        node = todo.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [node.work] if hasattr(node, "work") else []
        todo += [before for before, _ in node.next_functions]
    return found


def on_device(work: Any) -> int:
    """Numbers that a chunk holds outside of host memory: of its embeddings, its choice, and the memory before it."""
    chunk, before = (
        next(c.cell_contents for c in work.run.__closure__ if hasattr(c.cell_contents, "rows")),
        work.snapshot,
    )
    tensors = [chunk.embeds, *chunk.extras.values(), *chunk.rows]
    tensors += [t for u in chunk.undo for t in (u.gone, u.keys, u.values)]
    tensors += [t for m in before._held or () for t in m.tensors()]
    return sum(t.numel() for t in tensors if t is not None)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_chunk_leaves_nothing_on_the_device(spec: MemorySpec, host: Logged) -> None:
    media = media_of(1)
    for offload in ("none", "host"):
        stream = Stream(WithExtras(), spec, Gradient(offload=offload), media.n)
        state = stream.flush(stream.feed(stream.start(), media))
        works = stored(state.layers[-1].keys)
        assert len(works) == 7
        left = [on_device(work) for work in works]
        assert left == [0] * 7 if offload == "host" else min(left) > 0


def test_each_copy_begins_one_chunk_ahead(host: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass parks chunk after chunk; in the second, what chunk i needs is on its way while i + 1 is run."""
    model, media = ToyModel(), toy_stream(42)
    stream = Stream(model, SPEC, Gradient(offload="host"), media.n)
    state = stream.feed(stream.start(), media)
    loss = model.logits(stream.ask(state, [toy_question(4, 60)])).sum()
    assert host.log == [("park", i) for i in range(6)]
    del host.log[:]
    again = stream.passes.run

    def noted(layers: Any, embeds: Tensor, chunk: ChunkInputs, *more: Any) -> Any:
        host.log.append(("run", chunk.number))
        return again(layers, embeds, chunk, *more)

    monkeypatch.setattr(stream.passes, "run", noted)
    loss.backward()
    wanted = [("fetch", 5)]  # while the question is run
    for i in range(5, 0, -1):
        wanted += [("fetch", i - 1), ("run", i)]
    assert host.log == [*wanted, ("run", 0)]


def test_blocks_are_copied_one_ahead(host: Logged) -> None:
    media, log = toy_stream(21), []

    def parts() -> Iterator[TokenBlock]:
        for i, part in enumerate(TokenBlock.cut([media], 7)):
            log.append(f"copy {i}")
            yield part

    for i, part in enumerate(host.ahead(parts())):
        log.append(f"use {i}")
        assert torch.equal(part.embeds, media.embeds[:, 7 * i : 7 * i + 7])
        assert part.embeds.untyped_storage().data_ptr() != media.embeds.untyped_storage().data_ptr()
    assert log == ["copy 0", "copy 1", "use 0", "copy 2", "use 1", "use 2"]


@pytest.mark.parametrize("cuts", [[45], [3, 10, 1, 31], [7, 7, 31], [6, 2, 37]])
def test_cut(cuts: list[int]) -> None:
    media, size, start = toy_stream(45), 7, 3
    borders = pairwise([0, *torch.tensor(cuts).cumsum(0).tolist()])
    parts = list(TokenBlock.cut([media[begin:end] for begin, end in borders], size, start))
    assert torch.equal(torch.cat([p.embeds for p in parts], 1), media.embeds)
    ends = set(torch.tensor([p.n for p in parts]).cumsum(0).tolist())
    assert ends == {*range(size - start, 45, size), *torch.tensor(cuts).cumsum(0).tolist()}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_host_memory_is_let_go_of(spec: MemorySpec, host: Logged) -> None:
    model, media = ToyModel(), toy_stream(42)
    stream = Stream(model, spec, Gradient(offload="host"), media.n)
    state = stream.feed(stream.start(), media)
    loss = model.logits(stream.ask(state, [toy_question(4, 60)])).sum()
    assert any(p.joined for p in host.parked)
    loss.backward()
    assert not any(p.joined for p in host.parked)


# A whole step ---------------------------------------------------------------------------------------------------------

TURNS = [Turn("What colour?", "red"), Turn("Which sound?", "a beep", 2.0), Turn("How many?", "three", 5.0)]


def encoded(model: StreamingModel, offload: str, seconds: float = 10.0) -> EncodedStream:
    clip = omni_clips.Clip(seconds, 2.0)
    timed = [TimedTurn(model.render(turn), turn.time_s) for turn in TURNS]
    return encode_stream(model.open(clip.info, 2.0), clip.windows(2.0), timed, model.device, offload)


def step_results(model: StreamingModel, offload: str, spec: MemorySpec, loss: LossConfig | None = None) -> list[Tensor]:
    """Loss and adapter gradients of two accumulated clips."""
    model.module.zero_grad()
    found = []
    for seconds in (10.0, 6.0):
        step = StreamingStep(model, loss or LossConfig())
        result = step(encoded(model, offload, seconds), spec, Gradient(offload=offload))
        result.loss.backward()
        found.append(result.loss.detach())
    return found + [p.grad.clone() for _, p in lora_parameters(model) if p.grad is not None]


def with_adapter(model: StreamingModel) -> StreamingModel:
    add_lora(model, LoraSettings(r=4, alpha=8))
    generator = torch.Generator().manual_seed(0)
    for _, p in lora_parameters(model):
        p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(distill=1.0)], ids=["answers", "distilled"])
def test_a_step_on_a_real_model(nano: StreamingModel, host: Logged, loss: LossConfig) -> None:
    model, spec = with_adapter(nano), MemorySpec(budget=24, chunk_tokens=40)
    plain, found = (step_results(model, offload, spec, loss) for offload in ("none", "host"))
    assert ("park", 5) in host.log
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_encoded_streams_are_in_slabs(nano_session: StreamingModel, host: Logged) -> None:
    plain, found = (encoded(nano_session, offload) for offload in ("none", "host"))
    assert len(found.blocks) == len(plain.blocks)
    assert all(torch.equal(a.embeds, b.embeds) for a, b in zip(found.blocks, plain.blocks, strict=True))
    assert {b.embeds.untyped_storage().nbytes() for b in found.blocks if b.embeds.nbytes < SLAB} <= {SLAB}
    stacked = EncodedStream.stack([found, found])
    assert all(torch.equal(a.embeds[1:], b.embeds) for a, b in zip(stacked.blocks, plain.blocks, strict=True))


def test_deepstack_goes_along(salmonn_folder: Any, host: Logged) -> None:
    from omnimem_train.models.loading import load_model

    model, spec = with_adapter(load_model(salmonn_folder, device="cpu")), MemorySpec(budget=24, chunk_tokens=40)
    plain, found = (step_results(model, offload, spec) for offload in ("none", "host"))
    assert ("park", 3) in host.log
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


# On a GPU -------------------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.gpu
def test_parked_on_a_gpu() -> None:
    """Contents survive while the device goes on overwriting what was let go of."""
    device = torch.device("cuda", torch.cuda.current_device())
    memory = HostMemory(device)
    memory.slabs = Slabs(pinned=True, size=2**20)
    wanted = [torch.full((300_000,), float(i), device=device) for i in range(40)]
    parked = []
    for i in range(40):
        parked.append(memory.park([wanted[i] + 0, (wanted[i] + 0).long()]))
        torch.full((900_000,), -1.0, device=device)
    for i in reversed(range(40)):
        floats, whole = parked[i].get()
        if i:
            parked[i - 1].fetch()
        assert floats is not None and whole is not None
        assert torch.equal(floats, wanted[i]) and torch.equal(whole, wanted[i].long())


def gpu_model(folder: Any) -> StreamingModel:
    from omnimem_train.models.loading import load_model

    model = with_adapter(load_model(folder, device="cuda", dtype="bfloat16"))
    model.module.train()
    return model


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_a_step_on_a_gpu_is_the_same_to_the_bit(nano_folder: Any, positions: str) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model, spec = gpu_model(nano_folder), MemorySpec(budget=64, chunk_tokens=128, positions=positions)
        plain, again, found = (step_results(model, offload, spec) for offload in ("none", "none", "host"))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, same in zip(found, plain, again, strict=True):
        assert torch.equal(a, b) or not torch.equal(b, same), "equal wherever two plain runs are"
    assert torch.equal(found[0], plain[0])


def peak_of(model: StreamingModel, tokens: int, gradient: Gradient) -> int:
    """Bytes of device memory that a step on `tokens` random ones takes at its peak, beyond what was there before."""
    gc.collect()
    torch.cuda.empty_cache()
    block = toy_stream(tokens, dtype=torch.float32)
    embeds = torch.randn(1, tokens, model.hidden_size, dtype=model.dtype).pin_memory()
    media = replace(block, embeds=embeds).map(lambda x: x if x is embeds else x.to(model.device))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    spec = MemorySpec("perturbation", budget=512, chunk_tokens=512)
    stream = Stream(model, spec, gradient, media.n)
    state = stream.flush(stream.feed(stream.start(), media))
    asked = toy_question(4, tokens, dtype=torch.float32).map(lambda x: x.to(model.device))
    asked = replace(asked, embeds=torch.randn(1, 4, model.hidden_size, dtype=model.dtype, device=model.device))
    model.logits(stream.ask(state, [asked])).float().sum().backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@needs_cuda
@pytest.mark.gpu
def test_device_memory_does_not_grow_with_the_stream(nano_folder: Any) -> None:
    model = gpu_model(nano_folder)

    def measure(offload: str, tokens: int) -> int:
        return peak_of(model, tokens, Gradient(offload=offload))

    measure("host", 4096)  # kernels are compiled, buffers made
    held_short, held_long = measure("none", 8192), measure("none", 32768)
    short, long = measure("host", 8192), measure("host", 32768)
    assert long - short < 0.1 * (held_long - held_short)
