"""What runs a training step on several processes: DDP, DeepSpeed ZeRO-1/2/3, and FSDP2 for the frozen weights.

The launcher decides on processes; the recipe decides on the rest:

    train.deepspeed=FILE     DeepSpeed with that configuration reduces gradients, shards the optimizer's state (stages
                             1 and 2) and also the decoder layers' frozen weights (stage 3). Without it, DDP.
    train.sharding=fsdp      FSDP2 shards the decoder layers' frozen weights; gradients are left to DDP or ZeRO-1/2.

An engine is given the trained weights alone. DeepSpeed's stage 3 normally gathers weights by hooks on the modules, and
hangs when processes run unequal numbers of them; here its partitions are gathered in the order of
`omnimem_train.sharding`, as FSDP2's are. Adapters are whole on every process in all of this.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from safetensors.torch import load_file
from torch import Tensor, nn

from omnimem_train.errors import UserError
from omnimem_train.models.interface import StreamingModel
from omnimem_train.run_config import TrainConfig
from omnimem_train.sharding import Rota, shard_layers


def make_accelerator(t: TrainConfig) -> Accelerator:
    """The launcher's environment decides on processes and engine; `train.deepspeed` names an engine configuration.

    Raises:
        UserError: an engine configuration that is absent or asks for what is not supported.
    """
    plugin = None
    if t.deepspeed is not None:
        if not t.deepspeed.is_file():
            raise UserError(f"there is no DeepSpeed configuration {t.deepspeed}", remedy="correct train.deepspeed")
        plugin = DeepSpeedPlugin(hf_ds_config=str(t.deepspeed), zero3_init_flag=False)
    # without a GPU accelerate names no backend for DeepSpeed, and every process would take itself for the only one
    gloo = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if gloo else [],
        mixed_precision="no",
        gradient_accumulation_steps=t.accumulation,
        deepspeed_plugin=plugin,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if not torch.distributed.is_initialized():
            raise UserError(
                f"train.deepspeed={t.deepspeed} in a process that no launcher started",
                cause="DeepSpeed needs a process group, also for one process",
                remedy="put torchrun --nproc_per_node 1 -m in front of omnimem_train, or the deepspeed launcher",
            )
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        check_deepspeed(settings, t)
        # transformers looks at this object and would partition with ZeRO-3 while it loads; here that comes afterwards
        accelerator.state.deepspeed_plugin.dschf = None
        # nothing here is a DataLoader from which the engine could read these
        settings |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": t.accumulation,
            "gradient_clipping": t.max_grad_norm,
        }
    elif t.deepspeed is not None:
        raise UserError(
            f"train.deepspeed={t.deepspeed} is set, but accelerate chose {accelerator.distributed_type.value}",
            cause="DeepSpeed needs a distributed launcher, and accelerate leaves it out when told to use the CPU",
            remedy="launch with torchrun or deepspeed (on a CPU with DS_ACCELERATOR=cpu, without ACCELERATE_USE_CPU)",
        )
    elif accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(
            "accelerate was told to use FSDP",
            cause="it would shard the adapters and gather weights by hooks, and hang on streams of unequal length",
            remedy="launch as for plain data parallelism, and set train.sharding=fsdp",
        )
    return accelerator


def check_deepspeed(settings: Mapping[str, Any], t: TrainConfig) -> None:
    """Raises UserError if a DeepSpeed configuration asks for what would not be done."""
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage == 3 and t.sharding != "none":
        raise UserError(
            f"train.sharding={t.sharding} with DeepSpeed ZeRO-3",
            cause="both shard the frozen weights",
            remedy="set train.sharding=none, or use recipes/launch/zero2.json",
        )
    for part in ("offload_param", "offload_optimizer"):
        if stage == 3 and zero.get(part, {}).get("device", "none") != "none":
            raise UserError(
                f"{part} in {t.deepspeed}",
                cause="partitions of the frozen weights are gathered on the GPU here, and nothing of them is offloaded",
                remedy=f"remove {part}; the optimizer's state of an adapter is small",
            )


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether the engine is DeepSpeed's."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def shard(accelerator: Accelerator, model: StreamingModel, t: TrainConfig) -> Rota | None:
    """Spread the frozen weights of the decoder layers over the processes, if the settings say so and there are several.

    Raises:
        UserError: weights that cannot be cut (quantised ones).
    """
    engine = accelerator.state.deepspeed_plugin if is_deepspeed(accelerator) else None
    kind = "zero3" if engine is not None and engine.zero_stage == 3 else t.sharding
    if kind == "none" or accelerator.num_processes == 1:
        return None
    prefix = model.language_prefix()
    for name, weight in model.module.named_parameters():
        if name.startswith(prefix) and not weight.is_floating_point():
            raise UserError(
                f"{name} is {weight.dtype}, which cannot be sharded",
                cause="quantised weights belong together with their scales",
                remedy="set train.sharding=none (4-bit layers are small), or load the model in bfloat16",
            )
    return shard_layers(model, kind)


def prepare(
    accelerator: Accelerator, step: nn.Module, optimizer: Any, rota: Rota | None, weights: Sequence[nn.Parameter]
) -> tuple[Any, Any]:
    """Step and optimizer in the hands of the engine. `weights` are those that are trained."""
    if rota is not None:
        rota.attach(step, weights)
    if not is_deepspeed(accelerator) or accelerator.state.deepspeed_plugin.zero_stage < 3:
        return accelerator.prepare(step, optimizer)
    # Trained weights count as persistent: DeepSpeed shards their gradients and optimizer state, and leaves them whole
    # outside of its own step. Below this size it does so by itself.
    zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = max(w.numel() for w in weights)
    zero["memory_efficient_linear"] = False
    step, optimizer = accelerator.prepare(step, optimizer)
    make_whole(step)
    return step, optimizer


def make_whole(engine: Any) -> None:
    """Gather the trained weights of a ZeRO-3 engine where they are not whole yet."""
    missing = [w for w in engine.module.parameters() if hasattr(w, "ds_id") and w.shape != w.ds_shape]
    if missing:
        missing[0].all_gather(missing)


def check_saved(path: Path, live: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Open a file of trained weights again and hold it against the run.

    Args:
        path: a safetensors file. live: the weights as they are now. shapes: of the weights before an engine had them.

    Raises:
        UserError: names, shapes or values differ, or a half of an adapter that begins with random numbers is all zero.
    """
    saved = load_file(str(path))
    faults = [f"{name} is absent" for name in shapes if name not in saved]
    faults += [f"{name} is no weight of this run" for name in saved if name not in shapes]
    for name in saved.keys() & shapes.keys():
        if tuple(saved[name].shape) != tuple(shapes[name]):
            faults.append(f"{name} has shape {list(saved[name].shape)} instead of {list(shapes[name])}")
        elif not torch.equal(saved[name], live[name].detach().cpu()):
            faults.append(f"{name} differs from the weight in the run")
        elif ".lora_A." in name and not saved[name].any():
            faults.append(f"{name} is all zero")
    if faults:
        raise UserError(
            f"{path} is not what was trained: {'; '.join(faults[:3])} ({len(faults)} faults)",
            cause="the engine's weights were not whole when they were saved, or the disk lies",
            remedy="do not use this checkpoint; resume from the one before it",
        )
