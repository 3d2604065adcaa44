"""Make the pictures of docs/tour.md, and print the shapes it speaks of.

    python examples/tour_pictures.py
    python examples/tour_pictures.py --model runs/mine --out my-tour

Every picture comes from the model's own parts: nothing is drawn by hand. A scene the model was not trained on is
compressed and noised; a prompt is denoised, guided and decoded.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont
from torch import Tensor

import sfumato
from sfumato.diffusion.schedules import sigmas_for
from sfumato.generate import to_image
from sfumato.sampling import SAMPLERS, SeededNoise, Step
from sfumato.scenes import describe, render, sample_scene
from sfumato.storage import atomic_file

PROMPT = "a red metal sphere behind a small blue cube"
SCENE = 7  # seed of the held-out scene
SEED = 7  # of the noise
LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # sigma, in the picture of the noise
SCALES = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0)  # guidance
TILE, GAP, LABEL = 128, 6, 20  # pixels

Cell = tuple[str, Image.Image]


def page(rows: list[list[Cell]]) -> Image.Image:
    """Tiles in rows, each with its label above it."""
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (GAP + columns * (TILE + GAP), GAP + len(rows) * (LABEL + TILE + GAP)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for r, row in enumerate(rows):
        for c, (label, tile) in enumerate(row):
            x, y = GAP + c * (TILE + GAP), GAP + r * (LABEL + TILE + GAP)
            pen.text((x, y), label, "black", font)
            canvas.paste(tile.resize((TILE, TILE), Image.Resampling.NEAREST), (x, y + LABEL))
    return canvas


def save(canvas: Image.Image, path: Path) -> None:
    """Write a PNG of 256 colours: a quarter of the bytes, hardly to be told apart."""
    with atomic_file(path) as temporary:
        canvas.quantize(256).save(temporary, format="PNG", optimize=True)
    print(f"{path}  {path.stat().st_size / 1024:.0f} KiB")


def channels(latent: Tensor) -> list[Cell]:
    """Each channel of a latent (1, C, 1, H, W) as a gray picture: −3 is black, 3 is white."""
    gray = ((latent[0, :, 0] + 3) / 6).clamp(0, 1).mul(255).byte().cpu().numpy()  # (C, H, W)
    return [(f"channel {c}", Image.fromarray(values)) for c, values in enumerate(gray[:4])]


def compress(model: sfumato.Model) -> tuple[Image.Image, Tensor, Image.Image]:
    """A scene, its latent, what the decoder makes of it; also the latent and the scene's picture."""
    scene = sample_scene(SCENE, split="val")
    print(f"scene: {describe(scene, SCENE)[0]}")
    width, height = model.preset["size"]
    picture = to_image(render([scene], size=max(width, height)).rgb[0] * 2 - 1)
    latent = model.encode(picture)  # (1, C, 1, H/f, W/f)
    print(f"pixels {(1, 3, 1, height, width)} -> latent {tuple(latent.shape)}")
    back = model.decode(latent)[0]
    return page([[("picture", picture), *channels(latent), ("decoded", back)]]), latent, picture


def noise(model: sfumato.Model, latent: Tensor) -> Image.Image:
    """One latent at rising levels of noise: its first channel, and the whole of it decoded."""
    path = model.system.parameterization.path
    eps = SeededNoise([SEED], latent.shape[1:]).initial().to(latent.device)
    above, below = [], []
    for sigma in LEVELS:
        x = path.noisy(latent, eps, sigma)
        above.append((f"sigma {sigma:g}", channels(x)[0][1]))
        below.append(("decoded", model.decode(x)[0]))
    return page([above, below])


def denoise(model: sfumato.Model) -> tuple[Image.Image, Tensor]:
    """Every step of a prompt's sampling, decoded: the sample x, and the model's guess x0_hat. Also the last x."""
    request = model.complete(sfumato.Request(PROMPT, seed=SEED))
    cond = model.condition(request)
    steps: list[Step] = []
    latent = model.sample(cond, request.seeds(), request, on_step=steps.append)
    print(f"prompt features {tuple(cond.tokens.shape)}, mask {tuple(cond.mask.shape)}")
    sigmas = sigmas_for(request.schedule, request.steps, model.system.levels)
    print(f"sigmas {[round(float(s), 3) for s in sigmas]}")
    shown = steps[:: max(1, len(steps) // 8)]
    above = [(f"x after {s.index + 1}", model.decode(s.x)[0]) for s in shown]
    below = [(f"guess at {s.sigma:.2f}", model.decode(s.denoised)[0]) for s in shown]
    return page([above, below]), latent


def guide(model: sfumato.Model) -> Image.Image:
    """One prompt from two seeds at rising guidance."""
    rows = []
    for seed in (SEED, SEED + 1):
        drawn = [
            model.generate(sfumato.Request(PROMPT, seed=seed, guidance=scale)).images[0] for scale in SCALES
        ]
        rows.append([(f"guidance {scale:g}", image) for scale, image in zip(SCALES, drawn, strict=True)])
    return page(rows)


def decode(model: sfumato.Model, latent: Tensor, picture: Image.Image) -> Image.Image:
    """The drawn latent and its picture; then what compression costs: a part of the scene, before and after."""
    back = model.decode(model.encode(picture))[0]
    lost = ImageChops.difference(picture, back).point(lambda v: min(255, 4 * v))
    w, h = picture.size
    middle = (3 * w // 8, 3 * h // 8, 3 * w // 8 + w // 3, 3 * h // 8 + h // 3)
    return page(
        [
            [*channels(latent), ("decoded", model.decode(latent)[0])],
            [
                ("scene", picture),
                ("part of it", picture.crop(middle)),
                ("the same, decoded", back.crop(middle)),
                ("difference, 4 times", lost.crop(middle)),
                ("whole, 4 times", lost),
            ],
        ]
    )


def check_by_hand(model: sfumato.Model) -> None:
    """The five stages called one by one give the picture that `generate` gives."""
    request = model.complete(sfumato.Request(PROMPT, seed=SEED))
    width, height = request.size
    shape = model.system.autoencoder.latent_shape(1, height, width)  # (C, T, H, W)
    path = model.system.parameterization.path
    with torch.inference_mode():
        cond = model.condition(request)  # (2, N, D): the prompt, then the negative prompt
        drawn = SeededNoise([SEED], shape)  # a function of (seed, step, draw)
        sigmas = sigmas_for(request.schedule, request.steps, model.system.levels)
        x = drawn.initial().to(model.device) * path.prior_scale(float(sigmas[0]))
        step = model.denoiser(cond, request.guidance)  # denoise(x, sigma) -> x0_hat
        x = SAMPLERS[request.sampler](step, x, sigmas, path=path, noise=drawn)
        image = model.decode(x)[0]
    same = image.tobytes() == model.generate(request).images[0].tobytes()
    print(f"stage by stage equals generate(): {same}")


def main(model_name: str, out: Path) -> None:
    model = sfumato.load(model_name)
    config = model.system.config
    print(f"factor {config.autoencoder.factor}, patch {config.denoiser.patch}, width {config.denoiser.width}")
    first, latent, picture = compress(model)
    save(first, out / "compress.png")
    save(noise(model, latent), out / "noise.png")
    steps, drawn = denoise(model)
    save(steps, out / "denoise.png")
    save(guide(model), out / "guide.png")
    save(decode(model, drawn, picture), out / "decode.png")
    check_by_hand(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the pictures of docs/tour.md.")
    parser.add_argument("--model", default="pocket", help="a packaged model or a model folder")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), metavar="DIR")
    given = parser.parse_args()
    try:
        main(given.model, given.out)
    except sfumato.SfumatoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
