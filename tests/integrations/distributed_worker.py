"""Train a classifier on two processes under one engine after another, and measure how far each is from one process.

Run by torchrun, or by `accelerate launch`, in each process: OUT ENGINE... The first process writes the figures to OUT,
as JSON.
"""

import contextlib
import functools
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from models import mask_of, randomize, tiny_config
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastbert
from fastbert_kernels import get_backend

#: The interpreter is slow: less of everything.
SMALL = get_backend() == "triton"
LENGTHS = [6, 4, 3, 6] if SMALL else [11, 4, 6, 9, 3, 11, 2, 8]
SEQ = max(LENGTHS)
LAYERS, HEADS, STEPS = (1, 1, 2) if SMALL else (2, 4, 3)


@dataclass
class Engine:
    """A model and its optimizer as an engine wraps them.

    Attributes:
        backward: from a loss to gradients.
        unsynced: the context in which gradients stay on the process that made them.
        save, load: the state of both, in shards.
    """

    model: nn.Module
    optimizer: Any
    backward: Callable[[torch.Tensor], None]
    unsynced: Callable[[], AbstractContextManager[Any]]
    save: Callable[[str], None]
    load: Callable[[str], None]


def device() -> torch.device:
    """This process's GPU where each has one, else the CPU."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= dist.get_world_size():
        return torch.device("cuda", dist.get_rank())
    return torch.device("cpu")


def classifier(kind: Any = fastbert, dropout: float = 0.0, seed: int = 0) -> Any:
    config = tiny_config(
        num_labels=3,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(seed)
    model = kind.BertForSequenceClassification(config)
    randomize(model)
    return model.to(device()).train()


def batch(part: slice) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (len(LENGTHS), SEQ), generator=generator)
    labels = torch.randint(0, 3, (len(LENGTHS),), generator=generator)
    whole = {"input_ids": ids, "attention_mask": mask_of(LENGTHS, SEQ), "labels": labels}
    return {name: value[part].to(device()) for name, value in whole.items()}


WHOLE = slice(None)


def mine(part: int = 0, parts: int = 1) -> slice:
    """This process's share of the batch, or one part of it: sizes are equal, so that losses average."""
    share = len(LENGTHS) // dist.get_world_size()
    start = dist.get_rank() * share + part * share // parts
    return slice(start, start + share // parts)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def in_torch(model: nn.Module, unsynced: Callable[[], AbstractContextManager[Any]]) -> Engine:
    optimizer = sgd(model)

    def save(folder: str) -> None:
        parameters, state = get_state_dict(model, optimizer)
        dcp.save({"model": parameters, "optimizer": state}, checkpoint_id=folder)

    def load(folder: str) -> None:
        parameters, state = get_state_dict(model, optimizer)
        dcp.load({"model": parameters, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=state)

    return Engine(model, optimizer, torch.Tensor.backward, unsynced, save, load)


def ddp(model: nn.Module) -> Engine:
    wrapped = DistributedDataParallel(model, device_ids=[device().index] if device().type == "cuda" else None)
    return in_torch(wrapped, wrapped.no_sync)


def fsdp2(model: Any, kinds: tuple[type[nn.Module], ...] = (), policy: MixedPrecisionPolicy | None = None) -> Engine:
    """Each layer and the root sharded; or each module of some kinds and the root."""
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    modules = [m for m in model.modules() if isinstance(m, kinds)] if kinds else model.bert.encoder.layer
    for module in [*modules, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())

    @contextlib.contextmanager
    def unsynced() -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return in_torch(model, unsynced)


def in_accelerate(model: nn.Module, plugin: FullyShardedDataParallelPlugin | None = None) -> Engine:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    cpu = device().type == "cpu"
    accelerator = Accelerator(cpu=cpu, fsdp_plugin=plugin)
    if plugin is not None and cpu:
        # accelerate shards on accelerators only: on a CPU its FSDP path is turned on by hand, and all its own.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    model, optimizer = accelerator.prepare(model, sgd(model))

    def unsynced() -> AbstractContextManager[Any]:
        return accelerator.no_sync(model)

    return Engine(model, optimizer, accelerator.backward, unsynced, accelerator.save_state, accelerator.load_state)


def fsdp2_plugin(**settings: Any) -> FullyShardedDataParallelPlugin:
    # By the model's `_no_split_modules` accelerate 1.15 shards the word embeddings twice, also Hugging Face's.
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=False,
        **settings,
    )


def zero(model: Any, stage: int = 3, keep_layers: bool = False) -> Engine:
    """DeepSpeed's ZeRO; at stage 3 its hooks gather the parameters of a module for its calls, or of a layer whole."""
    import deepspeed

    if keep_layers:
        deepspeed.utils.set_z3_leaf_modules(model, [type(model.bert.encoder.layer[0])])
    settings = {
        "train_micro_batch_size_per_gpu": len(LENGTHS) // dist.get_world_size(),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=settings)
    return Engine(engine, engine, engine.backward, engine.no_sync, engine.save_checkpoint, engine.load_checkpoint)


LEAVES = (nn.Linear, nn.LayerNorm, nn.Embedding)
ENGINES: dict[str, Callable[[nn.Module], Engine]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2-leaves": functools.partial(fsdp2, kinds=LEAVES),
    "accelerate-ddp": in_accelerate,
    "accelerate-fsdp2": lambda model: in_accelerate(model, fsdp2_plugin()),
    "zero2": functools.partial(zero, stage=2),
    "zero3": zero,
    "zero3-layers": functools.partial(zero, keep_layers=True),
    "accelerate-fsdp2-checkpointing": lambda model: in_accelerate(model, fsdp2_plugin(activation_checkpointing=True)),
}


def whole(tensor: Any) -> torch.Tensor:
    """A sharded tensor put together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> list[torch.Tensor]:
    if type(model).__module__.startswith("deepspeed"):
        return [sys.modules["deepspeed"].utils.safe_get_full_grad(p).clone() for p in model.parameters()]
    return [whole(p.grad).clone() for p in model.parameters()]


def weights(model: nn.Module) -> list[torch.Tensor]:
    if type(model).__module__.startswith("deepspeed"):
        return [sys.modules["deepspeed"].utils.safe_get_full_fp32_param(p) for p in model.parameters()]
    return [whole(p.detach()) for p in model.parameters()]


def apart(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference, on any process."""
    largest = torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]).max()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def step(engine: Engine) -> list[torch.Tensor]:
    """One step on this process's share: the gradients it took."""
    engine.backward(engine.model(**batch(mine())).loss)
    taken = gradients(engine.model)
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    return taken


def alone(model: nn.Module, part: slice) -> list[torch.Tensor]:
    """The gradients of a part of the batch on one process."""
    model.zero_grad()
    model(**batch(part)).loss.backward()
    return gradients(model)


def training(make: Callable[[nn.Module], Engine]) -> dict[str, Any]:
    """The distance of gradients from Hugging Face's eager model on one process, over some steps."""
    plain = classifier(transformers)
    engine, model = make(classifier()), classifier(transformers)
    model.load_state_dict(plain.state_dict())
    optimizer, distances = sgd(model), []
    for _ in range(STEPS):
        wanted = alone(model, WHOLE)
        optimizer.step()
        distances.append(apart(step(engine), wanted))
    return {
        "gradients": max(distances),
        "weights": apart(weights(engine.model), weights(model)),
        "largest gradient": max(g.abs().max().item() for g in wanted),
        "fused": fastbert.explain(engine.model).fused,
        "explanation": str(fastbert.explain(engine.model)),
    }


def accumulation(make: Callable[[nn.Module], Engine]) -> dict[str, Any]:
    """Gradients of a share taken in two parts, of which the first is not synchronised."""
    model, engine = classifier(), make(classifier())
    parameters = list(engine.model.parameters())
    with engine.unsynced():
        engine.backward(engine.model(**batch(mine(0, 2))).loss / 2)
        if isinstance(engine.model, FSDPModule):  # which keeps them to itself
            synced = float(sum(p.grad is not None for p in parameters))
        else:
            synced = apart(gradients(engine.model), [g / 2 for g in alone(model, mine(0, 2))])
    engine.backward(engine.model(**batch(mine(1, 2))).loss / 2)
    return {"unsynced": synced, "accumulated": apart(gradients(engine.model), alone(model, WHOLE))}


def resuming(make: Callable[[nn.Module], Engine]) -> dict[str, Any]:
    """Parameters after steps with a sharded checkpoint between, in another process, against steps without."""
    engine = make(classifier())
    step(engine)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    engine.save(folder[0])
    for _ in range(STEPS - 1):
        step(engine)
    again = make(classifier(seed=5))
    before = apart(weights(again.model), weights(engine.model))
    again.load(folder[0])
    for _ in range(STEPS - 1):
        step(again)
    return {
        "before loading": before,
        "resumed": apart(weights(again.model), weights(engine.model)),
        "shards": len(list(Path(folder[0]).rglob("*.distcp"))),
    }


def dropout(make: Callable[[nn.Module], Engine]) -> dict[str, Any]:
    """What the processes make of the same rows, each from a seed of its own, and from the same seed."""
    model = classifier(dropout=0.3)
    engine = make(classifier(dropout=0.3))

    def logits(seed: int, of: nn.Module) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return of(**batch(WHOLE)).logits

    def between_processes(seed: int) -> float:
        ours = logits(seed, engine.model)
        everyone = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, ours)
        return apart(everyone[:1], everyone[1:])

    own = 100 + dist.get_rank()
    return {
        "own seed, as one process": apart([logits(own, engine.model)], [logits(own, model)]),
        "own seeds, between processes": between_processes(own),
        "one seed, between processes": between_processes(7),
    }


def half(policy: MixedPrecisionPolicy) -> dict[str, Any]:
    """The error of bfloat16 gradients against float32, and Hugging Face's own eager one, both under FSDP2."""
    wanted = alone(classifier(transformers), WHOLE)
    figures = {}
    for name, kind in (("ours", fastbert), ("eager", transformers)):
        engine = fsdp2(classifier(kind), policy=policy)
        figures[name] = apart(step(engine), wanted)
    return figures


def refusals() -> dict[str, str]:
    """What `fuse` and `unfuse` say of a model that is sharded already."""
    said = {}
    for verb, kind in ((fastbert.fuse, transformers), (fastbert.unfuse, fastbert)):
        model = fsdp2(classifier(kind)).model
        assert isinstance(model, FSDPModule)
        try:
            verb(model)
        except ValueError as error:
            said[verb.__name__] = str(error)
    return said


def main(out: str, *names: str) -> None:
    """Measure under each engine named and write the figures."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if device().type == "cuda":
        torch.cuda.set_device(device())
    figures: dict[str, Any] = {}
    for name in names:
        make = ENGINES[name]
        few = SMALL or name.startswith("zero")
        parts = [training, dropout] if few else [training, dropout, accumulation, resuming]
        figures[name] = functools.reduce(lambda found, part, make=make: found | part(make), parts, {})
    if "fsdp2" in names and not SMALL:
        figures["refusals"] = refusals()
        figures["bfloat16"] = half(MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(figures, indent=1))
    gc.collect()  # an engine that outlives its process group ends the process with an abort, now and then
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
