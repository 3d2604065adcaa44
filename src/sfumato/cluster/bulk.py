"""Files of prompts drawn, and folders encoded, with Ray Data: each actor opens the model once and takes row after row.

Pictures and shards are written by the actors themselves, so the folder must be one that all machines see.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sfumato.bulk.drawing import Task, draw
from sfumato.cluster.connection import absolute, join
from sfumato.data.latents import Shard, Write, write_shard
from sfumato.data.source import Source

BLOCKS = 1000  # at most, of which each is told when it is done


@dataclasses.dataclass(frozen=True)
class Opening:
    """How an actor opens a model. options: of `generate.load`. loras: keyword arguments of `Model.attach`."""

    options: dict[str, Any]
    loras: tuple[dict[str, Any], ...] = ()

    def model(self) -> Any:
        from sfumato.generate import load

        found = load(**self.options)
        for lora in self.loras:
            found.attach(**lora)
        return found


def drawing(
    opening: Opening, address: str, replicas: int
) -> Callable[[Sequence[Task]], Iterator[dict[str, Any]]]:
    """What draws tasks on a cluster and tells their receipts as they are done, in any order."""
    opening = Opening(absolute(opening.options), absolute(opening.loras))

    def write(tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
        kept = [dataclasses.replace(task, output=task.output.absolute()) for task in tasks]
        for row in _mapped(
            address, _Drawer, (opening, kept), len(kept), replicas, opening.options.get("device")
        ):
            yield json.loads(row["said"])

    return write


def encoding(source: Source, opening: dict[str, Any], address: str, replicas: int) -> Write:
    """What writes shards of latents on a cluster (`data.latents.build_latents`). opening: of `open_autoencoder`."""

    def write(shards: Sequence[Shard], batch: int, told: Callable[[int], None]) -> Iterator[None]:
        kept = [dataclasses.replace(shard, path=shard.path.absolute()) for shard in shards]
        made = (absolute(opening), source, kept, batch)
        for row in _mapped(address, _Encoder, made, len(kept), replicas, str(opening["device"])):
            told(int(row["said"]))
            yield

    return write


def _mapped(
    address: str, actor: type, made: tuple[Any, ...], count: int, replicas: int, device: str | None
) -> Iterator[dict[str, Any]]:
    """Rows {"said"} of `actor(*made)({"place": k})` for k in 0 … count − 1."""
    if not count:
        return
    ray = join(address, replicas + 1)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context.execution_options.preserve_order = False
    rows = ray.data.from_items([{"place": k} for k in range(count)], override_num_blocks=min(count, BLOCKS))
    gpus = 1 if device is not None and device.startswith("cuda") else 0
    done = rows.map(
        actor,
        fn_constructor_args=made,
        compute=ray.data.ActorPoolStrategy(size=min(replicas, count)),
        num_cpus=1,
        num_gpus=gpus,
    )
    yield from done.iter_rows()


class _Drawer:
    def __init__(self, opening: Opening, tasks: Sequence[Task]):
        self.model, self.tasks = opening.model(), tasks

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"said": json.dumps(draw(self.model, self.tasks[row["place"]]))}


class _Encoder:
    def __init__(self, opening: dict[str, Any], source: Source, shards: Sequence[Shard], batch: int):
        from sfumato.families.autoencoders import open_autoencoder

        self.encode, self.device = open_autoencoder(**opening).encode, opening["device"]
        self.source, self.shards, self.batch = source, shards, batch

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = self.shards[row["place"]]
        rows = write_shard(self.source, lambda pixels: self.encode(pixels.to(self.device)), shard, self.batch)
        return {"said": str(rows)}
