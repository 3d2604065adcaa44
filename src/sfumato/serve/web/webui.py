"""What clients of AUTOMATIC1111's web UI speak: /sdapi/v1/txt2img, img2img and what belongs to them.

Progress, interrupt and options are the key's own.
"""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

import sfumato
from sfumato import checks
from sfumato.errors import InputError
from sfumato.receipts import webui
from sfumato.receipts.provenance import parameters, recipe_of
from sfumato.serve.desk import Ask, Desk
from sfumato.serve.job import Live
from sfumato.serve.keys import Key
from sfumato.serve.ledger import CANCELLED, Record
from sfumato.serve.refusals import Refused, bad
from sfumato.serve.web.answers import Answer, ended, succeeded
from sfumato.serve.web.body import idempotency_of, json_body, look_at_picture
from sfumato.serve.web.schema import described
from sfumato.serve.web.webui_body import Body, facts_of, in_their_words
from sfumato.serve.web.webui_schema import GREY, OPTIONS, fields

VIA = "webui"
EXAMPLE = {"prompt": "a red metal sphere behind a small blue cube", "steps": 12, "width": 128, "height": 128}


def routes(desk: Desk) -> APIRouter:
    """All of them, on one desk."""
    router = APIRouter(prefix="/sdapi/v1", tags=["web ui"])
    chosen: dict[str, str] = {}  # the model that each key has chosen by its options
    shown = {
        "prompt": "a red cube",
        "init_images": [f"data:image/png;base64,{GREY}"],
        "denoising_strength": 0.6,
    }
    first = desk.settings.models[0].name

    def model_of(request: Request) -> str:
        return chosen.get(request.state.key.id, first)

    @router.post(
        "/txt2img", summary="Pictures from a prompt", openapi_extra=described(fields(False), EXAMPLE)
    )
    async def txt2img(request: Request) -> Response:
        return await _drawn(desk, request, model_of(request), pictures=False)

    @router.post("/img2img", summary="Pictures from a picture", openapi_extra=described(fields(True), shown))
    async def img2img(request: Request) -> Response:
        return await _drawn(desk, request, model_of(request), pictures=True)

    @router.get("/samplers")
    async def samplers(request: Request) -> Response:
        names = facts_of(desk.facts, model_of(request))["samplers"]
        return Answer([{"name": webui.SAMPLERS.get(n, n), "aliases": [n], "options": {}} for n in names])

    @router.get("/schedulers")
    async def schedulers(request: Request) -> Response:
        names = facts_of(desk.facts, model_of(request))["schedules"]
        automatic = {"name": "automatic", "label": "Automatic"}
        known = [automatic, *({"name": n, "label": webui.SCHEDULES.get(n, n)} for n in names)]
        more = {"aliases": None, "default_rho": -1, "need_inner_model": False}
        return Answer([{**each, **more} for each in known])

    @router.get("/sd-models")
    async def models() -> Response:
        return Answer([
            {"title": f["name"], "model_name": f["name"], "hash": _hash(f)[: webui.SHORT], "sha256": _hash(f),
             "filename": f["name"], "config": None}
            for f in desk.facts
        ])  # fmt: skip

    @router.get("/loras")
    async def loras(request: Request) -> Response:
        names = facts_of(desk.facts, model_of(request))["loras"]
        return Answer([{"name": n, "alias": n, "path": n, "metadata": {}} for n in names])

    @router.get("/options")
    async def options(request: Request) -> Response:
        facts = facts_of(desk.facts, model_of(request))
        return Answer({
            "sd_model_checkpoint": facts["name"], "sd_checkpoint_hash": _hash(facts), "samples_format": "png",
            "CLIP_stop_at_last_layers": 1,
        })  # fmt: skip

    @router.post("/options", summary="Choose the model that this key draws with",
                 openapi_extra=described(OPTIONS, {"sd_model_checkpoint": first}))  # fmt: skip
    async def choose(request: Request) -> Response:
        body, _ = await json_body(request)
        for name, value in body.items():
            if name == "sd_model_checkpoint":
                facts_of(desk.facts, value)
            elif name != "CLIP_stop_at_last_layers" or value != 1:
                raise bad(f"the option {checks.shown(name)} cannot be set here", name)
        if "sd_model_checkpoint" in body:
            chosen[request.state.key.id] = body["sd_model_checkpoint"]
        return Answer(None)

    @router.get("/progress", summary="How far this key's job is")
    async def progress(request: Request) -> Response:
        return Answer(_progress(desk, _mine(desk, request)))

    @router.post("/interrupt", summary="Stop this key's jobs")
    async def interrupt(request: Request) -> Response:
        for live in _mine(desk, request):
            desk.floor.stop(live, "cancelled")
        return Answer({})

    return router


def _hash(facts: dict[str, Any]) -> str:
    return webui.model_hash(facts["weights"])


def _mine(desk: Desk, request: Request) -> list[Live]:
    """The key's open jobs that came this way, the oldest first."""
    key: Key = request.state.key
    found = [
        live for live in desk.floor.live.values()
        if live.record.tenant == key.id and live.record.options.get("via") == VIA
    ]  # fmt: skip
    return sorted(found, key=lambda live: live.record.made)


def _progress(desk: Desk, jobs: list[Live]) -> dict[str, Any]:
    live = next((live for live in jobs if live.device is not None), jobs[0] if jobs else None)
    state = {
        "skipped": False,
        "interrupted": live is not None and live.ending is not None,
        "stopping_generation": False,
        "job": "" if live is None else live.id,
        "job_count": len(jobs),
        "job_timestamp": "0" if live is None else _stamp(live.record.made),
        "job_no": 0,
        "sampling_step": 0 if live is None else live.done,
        "sampling_steps": 0 if live is None else live.steps,
    }
    look = None if live is None or live.look is None else base64.b64encode(live.look[1]).decode()
    return {
        "progress": 0.0 if live is None else round(live.progress, 4),
        "eta_relative": 0.0 if live is None else round(live.seconds_left, 3),
        "state": state,
        "current_image": look,
        "textinfo": None,
    }


def _stamp(when: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(when))


async def _drawn(desk: Desk, request: Request, model: str, *, pictures: bool) -> Response:
    """Translate, draw, and answer with pictures and `info`; errors in the web UI's words."""
    try:
        return await _translated(desk, request, model, pictures)
    except (Refused, InputError) as error:
        raise in_their_words(error) from None


async def _translated(desk: Desk, request: Request, model: str, pictures: bool) -> Response:
    body, digest = await json_body(request)
    key: Key = request.state.key
    sends = body.get("send_images", True) is not False
    translated = Body(desk.facts, body, model)
    wanted, model = translated.request(pictures)
    files, brought = {}, {}
    for name, data in translated.pictures.items():
        upload = await look_at_picture(desk.books, key, data, name.partition(" ")[0])
        files[name], brought[upload.id] = upload.id, (upload, data)
    wanted |= {name: file for name, file in files.items() if name in ("image", "mask")}
    if translated.controls:
        wanted["controls"] = [
            {**values, "image": files[f"control {number}"]}
            for number, values in enumerate(translated.controls)
        ]
    idempotency = idempotency_of(request)
    ask = Ask(
        model,
        wanted,
        digest,
        looks=4,
        idempotency=idempotency,
        keep=idempotency is not None,
        via=VIA,
        brought=brought,
        forget=True,
    )
    record, live = await desk.submit(key, ask)
    record = await ended(request, desk.floor, record, live)
    if record.state == CANCELLED:  # as there: an interrupted job answers with what there is
        return Answer(
            {"images": [], "parameters": translated.plain(), "info": json.dumps(_info(desk, record, body))}
        )
    record = succeeded(record)
    images = []
    for number in range(record.pictures if sends else 0):
        path = await desk.books.work(desk.store.output, record.id, number)
        if path is None:
            raise Refused(410, "gone", "these pictures are not kept any more")
        images.append(await desk.books.work(lambda path=path: base64.b64encode(path.read_bytes()).decode()))  # type: ignore[misc]
    return Answer(
        {"images": images, "parameters": translated.plain(), "info": json.dumps(_info(desk, record, body))}
    )


def _recipe(desk: Desk, record: Record) -> dict[str, Any]:
    """How a job was drawn; of one that was not, how it would have been, as far as the front knows."""
    if record.receipt is not None:
        return dict(record.receipt["recipe"])
    facts = facts_of(desk.facts, record.model)
    return {"request": {**facts["preset"], **record.request}, "weights": facts["weights"]}


def _info(desk: Desk, record: Record, body: dict[str, Any]) -> dict[str, Any]:
    """What the web UI says of pictures, from their recipe."""
    receipt, recipe = record.receipt or {}, _recipe(desk, record)
    request = recipe["request"]
    count = record.pictures
    recipes = [recipe_of(recipe, number) for number in range(count)]
    width, height = record.request.get("size") or record.options["expected"]["size"]
    variation = request.get("variation") or {}
    prompt, negative, seed = request.get("prompt", ""), request.get("negative") or "", request.get("seed", 0)
    second = variation.get("seed", -1)
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * count,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * count,
        "seed": seed,
        "all_seeds": [each["request"].get("seed", 0) for each in recipes],
        "subseed": second,
        "all_subseeds": [(each["request"].get("variation") or {}).get("seed", -1) for each in recipes],
        "subseed_strength": variation.get("strength", 0),
        "width": width,
        "height": height,
        "sampler_name": webui.SAMPLERS.get(request.get("sampler", ""), request.get("sampler")),
        "cfg_scale": request.get("guidance"),
        "steps": request.get("steps"),
        "batch_size": count,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": record.model,
        "sd_model_hash": webui.model_hash(recipe["weights"])[: webui.SHORT],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.get("strength", (request.get("hires") or {}).get("strength")),
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [parameters(each) for each in recipes],
        "styles": body.get("styles") or [],
        "job_timestamp": _stamp(record.made),
        "clip_skip": request.get("clip_skip", 1),
        "is_using_inpainting_conditioning": False,
        "version": f"sfumato {sfumato.__version__}",
        "interrupted": record.state == CANCELLED,
        "receipt": {name: value for name, value in receipt.items() if name != "recipe"},
    }
