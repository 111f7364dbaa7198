"""The `omnimem` command. Errors a user can mend are printed and end with exit code 2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omnimem_train import __version__
from omnimem_train.errors import UserError

PLAN_CODES = "Exit code: 0 if the recipe fits the GPU; 1 if not, and what would fit is listed; 2 for an error."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    arguments = parsed(argv)
    try:
        code = arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:  # a full disk, a folder that cannot be written, an output that is a file
        remedy = "check that the path is right, can be written and has free space"
        print(f"error: {error}\n  remedy: {remedy}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was saved is complete (training goes on with train.resume=auto)", file=sys.stderr)
        return 130
    return code or 0


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; settings of a recipe may stand before and after options."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    settings = [text for text in rest if "=" in text and not text.startswith("-")]
    if rest and (settings != rest or not hasattr(arguments, "overrides")):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += settings
    return arguments


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    top = argparse.ArgumentParser(prog="omnimem", description="Streaming audio-visual LLMs in a fixed memory budget.")
    top.add_argument("--version", action=_Version, nargs=0, help="versions of this package and what it stands on")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[Any], int | None], help: str, epilog: str | None = None
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, epilog=epilog)
        sub.set_defaults(run=run)
        return sub

    for name, run, text in (
        ("train", _train, "fine-tune an adapter under random memory budgets"),
        ("cache", _cache, "encode all clips of a training recipe into its data.cache beforehand"),
        ("eval", _eval, "multiple-choice evaluation: selectors x budgets x (base, adapter)"),
        ("calibrate", _calibrate, "measure budgets across layers and write a table for memory.layer_table"),
    ):
        sub = command(name, run, text)
        sub.add_argument("recipe", type=Path, help="YAML file")
        sub.add_argument(
            "overrides", nargs="*", metavar="key=value", help="settings of the recipe, e.g. memory.budget=512"
        )

    sub = command("plan", _plan, "predict memory and time of a training recipe on a GPU", epilog=PLAN_CODES)
    sub.add_argument("recipe", type=Path, help="YAML file, as for train")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe, as for train")
    sub.add_argument("--gpu", default="auto", help="H200, H100, A100, ...; auto (default): the one of this machine")
    sub.add_argument("--seconds", type=float, help="length of a clip (default: data.max_duration_s, or 300)")
    sub.add_argument("--picture", default="1280x720", metavar="WIDTHxHEIGHT", help="of the clips (default 1280x720)")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")

    sub = command("ask", _ask, "stream a file through a fixed memory and answer a question about it")
    sub.add_argument("video", type=Path)
    sub.add_argument("question")
    sub.add_argument("--model", required=True, help="checkpoint folder or hub name")
    sub.add_argument("--adapter", type=Path, help="adapter folder; its memory.json is used")
    sub.add_argument("--budget", help='tokens a layer, a size such as 512MiB, or "full"')
    sub.add_argument("--selector", help="see `omnimem selectors`")
    sub.add_argument("--chunk-tokens", type=int)
    sub.add_argument("--fps", type=float, default=2.0, help="frames a second (default 2)")
    sub.add_argument("--encoder", action="append", default=[], metavar="KEY=VALUE", help="e.g. max_pixels=176400")
    sub.add_argument("--reader", default="decord", help="decord or pyav")
    sub.add_argument("--max-new-tokens", type=int, default=128)
    sub.add_argument("--dtype", default="auto")
    sub.add_argument("--quantization", default="none", help="none, or nf4 for a decoder in 4 bits")
    sub.add_argument("--device", default="auto")
    sub.add_argument("--save", type=Path, help="write the session here, to ask more later")

    sub = command("export", _export, "write the adapter of a training run in PEFT format, with memory.json")
    sub.add_argument("checkpoint", type=Path, help="run folder or checkpoint")
    sub.add_argument("out", type=Path)
    sub.add_argument("--model", help="base model, if it has moved since training")
    sub.add_argument("--layout", help="names of modules: thinker or omni; for video-SALMONN 2+ peft or salmonn")

    sub = command("report", _report, "write an HTML page of a training run and an evaluation")
    sub.add_argument("--train", type=Path, help="folder of a training run")
    sub.add_argument("--eval", type=Path, help="folder of an evaluation")
    sub.add_argument("--out", type=Path, required=True, help="the page")
    sub.add_argument("--title", default="omnimem-train")
    sub.add_argument("--note", action="append", default=[], help="a sentence for its top; may be repeated")

    command("selectors", _selectors, "list the selectors with source, cost and options")
    sub = command("tiny", _tiny, "write a tiny random Qwen2.5-Omni thinker, to try things without weights")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--size", default="tiny", help="tiny (2.5 M parameters) or nano (0.3 M)")
    sub.add_argument("--salmonn", metavar="BACKBONE", help="a video-SALMONN 2+ instead: qwen2_5_vl or qwen3_vl (0.4 M)")
    sub.add_argument("--seed", type=int, default=0)
    return top


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata

        lines = [f"omnimem-train {__version__}", f"python {sys.version.split()[0]}"]
        for name in (
            "torch",
            "transformers",
            "peft",
            "accelerate",
            "deepspeed",
            "bitsandbytes",
            "datasets",
            "decord",
            "av",
        ):
            try:
                lines.append(f"{name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:
                lines.append(f"{name} (not installed)")
        print("\n".join(lines))
        parser.exit()


def _train(arguments: Any) -> None:
    from omnimem_train.config import load_config
    from omnimem_train.run_config import RunConfig
    from omnimem_train.trainer import train

    folder = train(load_config(RunConfig, arguments.recipe, arguments.overrides))
    print(f"checkpoint: {folder}", flush=True)


def _cache(arguments: Any) -> None:
    import torch
    from accelerate import PartialState

    from omnimem_train.config import load_config
    from omnimem_train.models.loading import load
    from omnimem_train.run_config import RunConfig
    from omnimem_train.source import clip_source
    from omnimem_train.trainer import read_samples

    config = load_config(RunConfig, arguments.recipe, arguments.overrides)
    if config.data.cache is None:
        raise UserError("the recipe names no cache", remedy="name a folder: data.cache=FOLDER")
    samples = read_samples(config.data)
    state = PartialState(cpu=not torch.accelerator.is_available())
    device = str(state.device) if config.model.device == "auto" else config.model.device
    model = load(replace(config.model, device=device, adapter=None))
    data, rank, world = replace(config.data, balance="none"), state.process_index, state.num_processes
    source = clip_source(samples, data, config.encoder, model, config.train.output, rank=rank, world=world)
    for _ in _bar("clips", state.is_main_process, source.streams(0)):
        if source.position >= source.loader.clips_per_epoch:
            break
    assert source.cached is not None
    print(f"{data.cache}: {source.cached.cache.counts}", flush=True)
    state.destroy_process_group()


def _eval(arguments: Any) -> None:
    import torch
    from accelerate import PartialState

    from omnimem_train.config import load_config
    from omnimem_train.evaluate import Evaluator
    from omnimem_train.evaluation import EvalConfig, evaluate, table
    from omnimem_train.export import adapter_memory
    from omnimem_train.models.loading import load
    from omnimem_train.models.lora import disable_adapter

    config = load_config(EvalConfig, arguments.recipe, arguments.overrides)
    # told nothing, every process without an accelerator takes itself for the only one
    state = PartialState(cpu=not torch.accelerator.is_available())
    device = str(state.device) if config.model.device == "auto" else config.model.device
    model = load(replace(config.model, device=device))
    if config.model.adapter is not None and (Path(config.model.adapter) / "memory.json").exists():
        adapter_memory(Path(config.model.adapter), model)
    evaluator = Evaluator(
        model,
        config.settings(),
        method=config.method,
        max_new_tokens=config.max_new_tokens,
        adapters_off=partial(disable_adapter, model),
    )
    summary = evaluate(
        config,
        model,
        evaluator,
        rank=state.process_index,
        world=state.num_processes,
        barrier=state.wait_for_everyone,
        progress=partial(_bar, "clips", state.is_main_process),
    )
    if state.is_main_process:
        print(table(summary))
        if failed := summary["failed"]:
            print(
                f"\n{len(failed)} questions failed and count as wrong, e.g. {failed[0]['question']}: {failed[0]['why']}"
            )
    state.destroy_process_group()


def _calibrate(arguments: Any) -> None:
    from omnimem_train.calibration import CalibrationConfig, calibrate
    from omnimem_train.config import load_config
    from omnimem_train.models.loading import load

    config = load_config(CalibrationConfig, arguments.recipe, arguments.overrides)
    report = calibrate(config, load(config.model), partial(_bar, "clips", True))
    for i, (layer, entry) in enumerate(zip(report["layers"], report["layer_table"], strict=True)):
        print(f"layer {i:2}: complexity {layer['complexity']:.3f} +- {layer['complexity_std']:.3f}, tokens {entry}")
    print(f"use it with memory.layer_table={config.output}")


def _plan(arguments: Any) -> int:
    from omnimem_train.config import load_config
    from omnimem_train.gpus import find_gpu
    from omnimem_train.plan import picture_size, request
    from omnimem_train.plan_report import report, table
    from omnimem_train.run_config import RunConfig

    a = arguments
    gpu = find_gpu(a.gpu)
    asked = request(load_config(RunConfig, a.recipe, a.overrides), gpu, a.seconds, picture_size(a.picture))
    found = report(asked)
    print(json.dumps(found, indent=2) if a.json else table(found))
    return 0 if found["largest_step"]["fits"] else 1


def _bar(unit: str, shown: bool, items: Iterable[Any]) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, unit=unit, disable=not shown)


def _ask(arguments: Any) -> None:
    from omnimem_train.export import adapter_memory
    from omnimem_train.media import read_windows
    from omnimem_train.memory.spec import MemorySpec
    from omnimem_train.models.loading import load_model
    from omnimem_train.session import StreamSession

    a = arguments
    if not a.question.strip() or a.max_new_tokens < 1:
        raise UserError(
            f"the question is {a.question!r}, --max-new-tokens {a.max_new_tokens}",
            remedy="ask something, and allow at least 1 token",
        )
    if a.save is not None and (a.save.is_dir() or not a.save.parent.is_dir()):
        raise UserError(f"the session cannot be saved as {a.save}", remedy="name a file in a folder that exists")
    spec = MemorySpec() if a.adapter is None else adapter_memory(a.adapter)
    spec = _changed(spec, a)
    model = load_model(a.model, dtype=a.dtype, device=a.device, adapter=a.adapter, quantization=a.quantization)
    if a.adapter is not None:
        adapter_memory(a.adapter, model)
    with read_windows(
        a.video, fps=a.fps, window_s=model.window_s(a.fps), sampling_rate=model.sampling_rate, reader=a.reader
    ) as windows:
        session = StreamSession(model, spec, windows.info, a.fps, **_options(a.encoder))
        for window in _bar("windows", True, windows):
            session.feed(window)
    print(session.ask(a.question, a.max_new_tokens))
    kept, waiting = session.kept_tokens(), session.state.pending
    seen = session.state.n_run + (0 if waiting is None else waiting.n)
    print(
        f"[{session.watched_s:g} s watched, {seen} tokens; kept a layer: {min(kept)} to {max(kept)}, "
        f"selector {spec.selector}]",
        file=sys.stderr,
    )
    if a.save is not None:
        session.save(a.save)


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    """Encoder options from KEY=VALUE; values are YAML, as in recipes."""
    from omnimem_train.config import load_config
    from omnimem_train.run_config import RunConfig

    return load_config(RunConfig, None, [f"encoder.{pair}" for pair in pairs]).encoder


def _changed(spec: Any, a: Any) -> Any:
    """The memory spec with what the command line says."""
    changes: dict[str, Any] = {}
    if a.selector is not None:
        changes |= {"selector": a.selector, "selector_options": {}}
    if a.chunk_tokens is not None:
        changes["chunk_tokens"] = a.chunk_tokens
    if a.budget is not None:
        budget = None if a.budget == "full" else int(a.budget) if a.budget.lstrip("-").isdigit() else a.budget
        spec = spec.at(budget)
    return spec.replace(**changes)


def _export(arguments: Any) -> None:
    from omnimem_train.export import export_adapter

    report = export_adapter(arguments.checkpoint, arguments.out, model_path=arguments.model, layout=arguments.layout)
    print(f"{arguments.out}: " + ", ".join(f"{k} {v}" for k, v in report.items()))


def _report(arguments: Any) -> None:
    from omnimem_train.report import write_report

    a = arguments
    write_report(a.out, title=a.title, train=a.train, evaluation=a.eval, notes=a.note)
    print(a.out)


def _selectors(arguments: Any) -> None:
    from omnimem_train.memory import selector_table

    for row in selector_table():
        print(f"{row.name}\n    source:  {row.source}\n    cost:    {row.cost}\n    options: {json.dumps(row.options)}")


def _tiny(arguments: Any) -> None:
    from omnimem_train.models.salmonn.tiny import make_tiny_salmonn
    from omnimem_train.models.tiny import make_tiny

    a = arguments
    if a.salmonn is not None:
        print(make_tiny_salmonn(a.folder, a.seed, a.salmonn))
    else:
        print(make_tiny(a.folder, a.seed, a.size))
