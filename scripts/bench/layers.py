"""The steps of a decoder layer by themselves, short and stock, forward and backward, on a chunk after a full memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from cases import Bench, clear, encoded, with_lora
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from omnimem_train.gradient import Gradient
from omnimem_train.losses import LossConfig
from omnimem_train.memory import LayerMemory
from omnimem_train.models.attention import attend
from omnimem_train.models.interface import Tap
from omnimem_train.models.lora import lora_parameters
from omnimem_train.step import StreamingStep

CALLS = 10  # between two synchronisations

Step = Callable[[], Tensor]


def time_us(bench: Bench, run: Callable[[], object], reps: int = 5) -> list[float]:
    """Microseconds a call takes."""
    run()
    return [1e6 * s / CALLS for s in bench.clock.samples(lambda: [run() for _ in range(CALLS)], reps)]


def draw(bench: Bench, *shape: int) -> Tensor:
    """Normal numbers that want a gradient."""
    return torch.randn(*shape, device=bench.device, dtype=bench.dtype).requires_grad_()


def add_step(bench: Bench, name: str, run: Step, inputs: list[Tensor]) -> None:
    """Record the time of a step, and of its backward pass alone."""

    @torch.no_grad()
    def forward() -> Tensor:
        return run()

    out = run()
    grad = torch.randn_like(out)
    bench.add(f"step.{name}", time_us(bench, forward), "us")
    back = partial(torch.autograd.grad, out, inputs, grad, retain_graph=True)
    bench.add(f"step.{name}.backward", time_us(bench, back), "us")


def stock(module: torch.nn.Module) -> Callable[..., Tensor]:
    """The stock `forward` of a module that was given another."""
    short = module.forward
    return short.args[1] if isinstance(short, partial) else short


def layers(bench: Bench) -> None:
    """Norm, MLP and adapters of layer 0: as they run, and stock. Then the whole layer, with and without gradient."""
    model, size, n = bench.model, bench.shape.size, bench.shape.chunk
    with_lora(bench)
    x = draw(bench, 1, n, size.hidden)
    prefix = model.language_prefix() + "0."
    for name in ("input_layernorm", "mlp", "self_attn.q_proj"):
        module = model.module.get_submodule(prefix + name)
        inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
        add_step(bench, name, lambda module=module: module(x), inputs)
        add_step(bench, f"{name}.stock", lambda module=module: stock(module)(x), inputs)
    past = memory(bench)
    positions = torch.arange(n, device=bench.device)[None, :, None].expand(1, -1, 3)
    rope = model.rope(positions)
    weights = [p for name, p in lora_parameters(model) if name.startswith(prefix)]
    for kernel in ("sdpa", "split"):
        before, model.attention = model.attention, kernel
        add_step(bench, f"layer.{kernel}", lambda: model.run_layer(0, x, rope, Tap(past), {}), [x, *weights])
        model.attention = before


def memory(bench: Bench) -> LayerMemory:
    """A full one, keys and values alone."""
    size = bench.shape.size
    keys, values = (draw(bench, 1, size.kv_heads, bench.shape.budget, size.hidden // size.heads) for _ in range(2))
    return LayerMemory.bare(keys, values)


def attention_calls(bench: Bench) -> None:
    """The attention call alone, in one piece and split; and the first call at a new length, which may plan anew."""
    size, n = bench.shape.size, bench.shape.chunk
    d = size.hidden // size.heads
    query, key, value = (draw(bench, 1, h, n, d) for h in (size.heads, size.kv_heads, size.kv_heads))
    past = memory(bench)
    shorter = LayerMemory.bare(past.keys[:, :, 77:], past.values[:, :, 77:])
    weight = torch.randn(1, n, size.heads, d, device=bench.device, dtype=bench.dtype)
    inputs = [query, key, value, past.keys, past.values]

    def run(kernel: str, past: LayerMemory = past) -> Tensor:
        return attend(torch.nn.Identity(), query, key, value, tap=Tap(past), kernel=kernel)[0]

    def whole(kernel: str, past: LayerMemory = past) -> list[Tensor]:
        out = run(kernel, past)
        return [out, *torch.autograd.grad(out, inputs, weight)]

    for kernel in ("sdpa", "split"):
        add_step(bench, f"attention.{kernel}", partial(run, kernel), inputs)
        first, *again = (bench.clock.once(partial(whole, kernel, shorter)) for _ in range(3))
        bench.add(f"attention.{kernel}.new_length", [1e3 * first], "ms", note=f"later {1e3 * min(again):.3g} ms")
    names = ("out", "query", "key", "value", "old_key", "old_value")
    for name, a, b in zip(names, whole("split"), whole("sdpa"), strict=True):
        a, b = a.detach().double(), b.detach().double()
        error = float((a - b).norm() / b.norm())
        bench.results.add(f"attention.difference.{name}{bench.suffix}", error, "relative")


def profile_step(bench: Bench) -> None:
    """A step that goes back through two chunks after a full memory: its time, how long kernels run in it (the rest of
    the time the device waits for the host), and a table of kernels by time: profile_step.txt."""
    parameters = with_lora(bench)
    n_full = -(-bench.shape.budget // bench.shape.chunk) + 2
    stream, spec = encoded(bench, n_full * bench.shape.chunk), bench.spec("perturbation")
    step = StreamingStep(bench.model, LossConfig())

    def run() -> None:
        step(stream, spec, Gradient("last", chunks=2)).loss.backward()
        clear(parameters)

    run()
    bench.add("short_step", bench.clock.samples(run, 3))
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.device.type == "cuda")
    with profile(activities=activities) as found:
        run()
        bench.clock.synchronise()
    averages = found.key_averages()
    if bench.device.type == "cuda":
        kernels = [e for e in averages if e.device_type == DeviceType.CUDA]
        bench.add("short_step.kernels", [sum(e.self_device_time_total for e in kernels) / 1e6])
    order = "self_cuda_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    table = averages.table(sort_by=order, row_limit=70, max_name_column_width=90)
    path = bench.results.path.with_name(f"profile_step{bench.suffix}.txt")
    path.write_text(table + "\n")
    print("wrote", path)


LAYER_CASES: dict[str, Callable[[Bench], None]] = {"attention": attention_calls}
ADAPTED_LAYER_CASES: dict[str, Callable[[Bench], None]] = {"layers": layers}
ADAPTED_PROFILE_CASES: dict[str, Callable[[Bench], None]] = {"profile_step": profile_step}
