"""The plan of memory on the command line: made before weights are read, shown or followed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato.cli import show
from sfumato.errors import InputError

if TYPE_CHECKING:
    import torch

    from sfumato.generate import Model
    from sfumato.memory import MemoryPlan
    from sfumato.types import Request


def planned(
    model: Model,
    request: Request,
    offload: str | None,
    limit: int | None,
    *,
    told: bool,
    kind: str | None = None,
) -> tuple[Model, MemoryPlan | None]:
    """The model as a plan that fits wants it, and the plan; None of a model that tells none.

    told: only the plan is wanted, and the model stays as it is. kind: of file that a clip is written to. `InputError`
    when nothing fits, with what would; and when a plan or a limit is asked of a model that tells none, or a level of
    one that has none.
    """
    from sfumato import planning
    from sfumato.memory import leave_no_holes

    if not planning.tells(model):
        if request.moves and planning.tells_clips(model) and (told or limit is not None) and offload is None:
            found = planning.plan_clip(model, request, limit, kind)
            if not found.fits:
                raise planning.refusal_of_clip(model, request, found, kind)
            return model, found
        packaged = not model.system.traces
        why = f"{model.name!r} is small" if packaged else "what another engine takes is not known"
        asked = {"plan": told, "memory": limit is not None, "offload": packaged and offload is not None}
        for name in asked:
            if asked[name]:
                so = "all of it stays in memory" if name == "offload" else "tells no plan"
                raise InputError(
                    f"{name} is for checkpoints that PyTorch runs; {why} and {so}", argument=name
                )
        return (model if packaged else planning.offloaded(model, offload or "none")), None
    found = planning.plan(model, request, offload, limit)
    if not found.fits:
        raise planning.refusal(model, request, found)
    if offload is None or limit is not None:
        found = planning.filled(model, request, found)
    if told:
        return model, found
    if found.offload != "none":  # memory is short
        leave_no_holes()
    return planning.follow(model, found), found


def show_plan(plan: MemoryPlan | None, request: Request, as_json: bool) -> None:
    """Print it, as a table or as one JSON object."""
    from sfumato.planning import shown

    assert plan is not None
    if as_json:
        show.answer(plan.to_dict())
        return
    rows = [
        [stage.name, shown(stage.weights), shown(stage.activations), shown(plan.base + stage.bytes)]
        for stage in plan.stages
    ]
    whose = "of --memory" if plan.limited else "free"
    show.table(
        f"{shown(plan.peak)} at most, of {shown(plan.allowed)} {whose}: it fits with --offload {plan.offload}"
        f"{f' and {shown(plan.kept)} of layers kept' if plan.kept else ''}, in {plan.dtype} on {plan.device}",
        ["", "weights", "beside them", "in all"],
        rows,
    )
    if plan.base:
        show.line(f"{shown(plan.base)} of it is the program itself; pictures are decoded in bands of rows")


def peak(device: torch.device) -> int:
    """The most memory that was taken: of the GPU, or of the process."""
    import torch

    from sfumato.memory import peak_resident

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
