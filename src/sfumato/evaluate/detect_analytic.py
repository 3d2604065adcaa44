"""The analytic detector: background, colour, silhouette and perspective; nothing in it was learned by gradient.

1. A smooth surface is fitted to the logarithm of the picture, robustly, so that objects do not pull it: the
empty floor. 2. Each pixel's colour against that floor is judged by Gaussian mixtures, one for the floor with
its shadows and one
   for each colour word (a quadratic discriminant).
3. Connected regions of one colour become objects; patches enclosed by another colour are reflections and join it.
4. Shape and material are read from a normalised crop by kernel ridge regression, solved in closed form. Size
and place follow
   from perspective: where a solid of known proportions must stand to look so wide and so high.

It shares no code, features or training pictures with the learned detector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.evaluate.detect import SIDE, Detection, check_pixels
from sfumato.evaluate.detect_network import fit, weights_folder
from sfumato.scenes.graph import COLORS, HALF_HEIGHT, HALF_WIDTH, MATERIALS, RADIUS, SHAPES, SIZES, Camera
from sfumato.storage import load_tensors

FEATURES = 8  # numbers a pixel is judged by
CROP = 16  # cells a side of the normalised crop
MIN_AREA = 14  # pixels; the smallest object of a scene covers about 70
ROUNDS = 10  # of the robust background fit
CAMERA = Camera(0.0, math.radians(33.5), 3.1 / math.tan(math.radians(17)), math.radians(34), (0.0, 0.0, 0.45))


@dataclass(frozen=True)
class Region:
    """One candidate object. mask: (H, W) bool; color: index; certainty: mean probability of its pixels; row:
    its features."""

    mask: Tensor
    color: int
    certainty: float
    row: Tensor


def linear_log(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1], sRGB → natural logarithm of linear light, floored at 0.004."""
    v = (pixels + 1) / 2
    return (
        torch.where(v <= 0.04045, v / 12.92, ((v.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)
        .clamp_min(0.004)
        .log()
    )


def empty_floor(light: Tensor) -> Tensor:
    """The floor without objects: a polynomial in picture coordinates fitted by reweighted least squares, (B,
    3, H, W)."""
    line = torch.linspace(-1, 1, SIDE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    terms = [y * 0 + 1, x, y, x * x, x * y, y * y, y**3, x * x * y, y**4, x * x * y * y, y**5]
    basis = torch.stack(terms, dim=-1)  # (H, W, P)
    some = basis[1::3, 1::3].flatten(0, 1)  # (n, P)
    outer = (some[:, :, None] * some[:, None]).flatten(1)  # (n, P·P)
    seen = light[:, :, 1::3, 1::3].flatten(2).transpose(1, 2)  # (B, n, 3)
    weight = torch.ones(seen.shape[:2])
    size = some.shape[1]
    answer = torch.zeros(len(light), size, 3)
    for k in range(ROUNDS):
        normal = (weight @ outer).unflatten(1, (size, size)) + 1e-3 * torch.eye(size)
        answer = torch.linalg.solve(normal, some.T @ (weight[..., None] * seen))
        gap = seen - some @ answer
        scale = max(0.05, 0.4 * 0.6**k)
        weight = 1 / (1 + (gap.norm(dim=2) / scale) ** 4)
        weight = weight * torch.where(gap.mean(2) < 0, 0.5, 1.0)  # shadows darken: trust what is brighter
    return (basis.flatten(0, 1) @ answer).transpose(1, 2).unflatten(2, (SIDE, SIDE))


def pixel_features(pixels: Tensor) -> Tensor:
    """(B, 8, H, W): brightness against the floor; chroma, absolute and against the floor; brightness; local
    contrast twice."""
    light = linear_log(pixels)
    gap = light - empty_floor(light)
    bright = gap.mean(1, keepdim=True)
    chroma = [light[:, :1] - light[:, 1:2], light[:, 2:] - light[:, 1:2]]
    against = [gap[:, :1] - gap[:, 1:2], gap[:, 2:] - gap[:, 1:2]]
    contrast = [F.max_pool2d(bright, k, 1, k // 2) + F.max_pool2d(-bright, k, 1, k // 2) for k in (5, 3)]
    return torch.cat([bright, *chroma, *against, light.mean(1, keepdim=True), *contrast], dim=1).clamp(-4, 4)


def components(classes: Tensor) -> Tensor:
    """Connected regions (8 neighbours) of equal class: (B, H, W) int64, 0 where the class is 0, else one
    number per region."""
    count, height, width = classes.shape
    label = torch.arange(1, height * width + 1).view(1, height, width).repeat(count, 1, 1) * (classes > 0)
    padded = F.pad(classes, [1] * 4)
    while True:
        before = label
        around = F.pad(label, [1] * 4)
        for dy, dx in ((0, 1), (1, 0), (2, 1), (1, 2), (0, 0), (0, 2), (2, 0), (2, 2)):
            same = padded[:, dy : dy + height, dx : dx + width] == classes
            label = torch.maximum(label, around[:, dy : dy + height, dx : dx + width] * same)
        label = label * (classes > 0)
        flat = F.pad(label.flatten(1), (1, 0))  # jump to the label of the pixel one is named after
        label = flat.gather(1, label.flatten(1)).view_as(label)
        if torch.equal(before, label):
            return label


class AnalyticDetector:
    """The analytic `Detector`. tensors: what `fit_analytic` solved for."""

    name = "analytic"

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = {name: value.float() for name, value in tensors.items()}
        # log N(v) = level − |R (v − m)|² / 2, written out as one product with (v_i v_j, v_i)
        means, roots = self.tensors["means"].double(), self.tensors["roots"].double()
        precision = roots.transpose(1, 2) @ roots
        a, b = torch.triu_indices(FEATURES, FEATURES)
        squares = -0.5 * precision[:, a, b] * torch.where(a == b, 1.0, 2.0)
        pulled = (precision @ means[..., None])[..., 0]
        self.forms = torch.cat([squares, pulled], dim=1).T.float()
        self.offsets = (self.tensors["levels"] - 0.5 * (pulled * means).sum(1)).float()

    @torch.no_grad()
    def detect(self, pixels: Tensor) -> list[list[Detection]]:
        found: list[list[Detection]] = []
        for part in fit(check_pixels(pixels).cpu()).split(8):
            for regions in self.regions(part):
                found.append([d for region in regions if (d := self._read(region)) is not None])
        return [sorted(each, key=lambda d: -d.confidence) for each in found]

    def likelihoods(self, features: Tensor) -> Tensor:
        """(B, 8, H, W) → (B, 11, H, W): log density times prior of floor and colours, averaged over 3×3 pixels."""
        v = features.movedim(1, -1).reshape(-1, FEATURES)
        logs = torch.cat([self._squares(v), v], dim=1) @ self.forms + self.offsets  # (pixels, Gaussians)
        values = torch.logsumexp(logs.unflatten(1, (len(COLORS) + 1, -1)), dim=2) + self.tensors["prior"]
        values = values.view(*features.shape[:1], *features.shape[2:], -1).movedim(-1, 1)
        top = values.amax(1, keepdim=True)
        return F.avg_pool2d(F.pad((values - top).clamp_min(-12), [1] * 4, mode="replicate"), 3, 1)

    @staticmethod
    def _squares(v: Tensor) -> Tensor:
        """All products of two features, (N, 36)."""
        a, b = torch.triu_indices(FEATURES, FEATURES)
        return v[:, a] * v[:, b]

    def regions(self, pixels: Tensor) -> list[list[Region]]:
        """Candidate objects of each picture."""
        features = pixel_features(pixels)
        scores = self.likelihoods(features)
        classes = scores.argmax(1)
        islands = components((classes > 0).long())
        patches = components(classes)
        sure = 1 - scores.softmax(1)[:, 0]
        return [
            [
                Region(
                    mask, color, float(sure[b][mask].mean()), region_features(features[b], mask, classes[b])
                )
                for mask, color in _split(classes[b], islands[b], patches[b])
            ]
            for b in range(len(pixels))
        ]

    def answers(self, rows: Tensor) -> Tensor:
        """Kernel ridge regression: (N, features) → (N, 6 shapes + 2 materials + 1 for being an object at all)."""
        t = self.tensors
        z = ((rows - t["centre"]) @ t["axes"]) / t["spread"]
        waves = torch.cos(z @ t["frequencies"] + t["phases"])
        return torch.cat([waves, z, torch.ones(len(z), 1)], dim=1) @ t["solution"]

    def _read(self, region: Region) -> Detection | None:
        answer = self.answers(region.row[None])[0]
        shapes, materials, real = answer.split([len(SHAPES), len(MATERIALS), 1])
        if float(real) < 0.5:
            return None
        shape = SHAPES[int(shapes.argmax())]
        box = box_of(region.mask)
        size, right, away = place(shape, box)
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        certainty = min(1.0, region.certainty)
        material = MATERIALS[int(materials.argmax())]
        return Detection(shape, COLORS[region.color], material, size, x, y, right, away, box, certainty)


def _split(classes: Tensor, islands: Tensor, patches: Tensor) -> list[tuple[Tensor, int]]:
    """Objects of one picture as (mask, colour): patches of one colour that show against the floor, with what
    they enclose."""
    floor = F.max_pool2d((classes == 0).float()[None, None], 3, 1, 1)[0, 0] > 0
    found: list[tuple[Tensor, int]] = []
    for island in islands.unique().tolist():
        if island == 0:
            continue
        inside = islands == island
        area = int(inside.sum())
        if area < MIN_AREA:
            continue
        names, sizes = patches[inside].unique(return_counts=True)
        kept: list[tuple[Tensor, int]] = []
        for name, size in zip(names.tolist(), sizes.tolist(), strict=True):
            if size < max(MIN_AREA, 0.08 * area):
                continue
            mask = patches == name
            thin = -F.max_pool2d(-mask.float()[None, None], 3, 1, 1)[0, 0] > 0
            rim = mask & ~thin
            if int((rim & floor).sum()) >= 0.25 * int(rim.sum()) or size > 0.5 * area:
                kept.append((mask, int(classes[mask][0]) - 1))
        found += _join(kept or [(inside, int(classes[inside].bincount()[1:].argmax()))], inside)
    return found


def _join(kept: list[tuple[Tensor, int]], inside: Tensor) -> list[tuple[Tensor, int]]:
    """Unite parts of one colour that one object could span, then give each leftover pixel to the part that
    grows to it first."""
    parts: list[tuple[Tensor, int]] = []
    for mask, color in sorted(kept, key=lambda part: -int(part[0].sum())):
        for k, (other, its) in enumerate(parts):
            union = mask | other
            box = box_of(union)
            if its == color and box[2] - box[0] < _widest(box[3]):
                parts[k] = (union, color)
                break
        else:
            parts.append((mask, color))
    owner = sum(
        (mask * (k + 1) for k, (mask, _) in enumerate(parts)), torch.zeros_like(inside, dtype=torch.long)
    )
    while True:
        grown = F.max_pool2d(owner.float()[None, None], 3, 1, 1)[0, 0].long()
        fresh = torch.where(inside & (owner == 0), grown, owner)
        if torch.equal(fresh, owner):
            return [(owner == k + 1, color) for k, (_, color) in enumerate(parts)]
        owner = fresh


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a mask, 0..1."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    return left / SIDE, top / SIDE, right / SIDE, bottom / SIDE


def _ray(x: float, y: float, height: float) -> tuple[float, float, float]:
    """Where the line of sight through (x, y) is `height` above the floor: right, away, and the picture's
    scale per unit."""
    position, right, up, forward = CAMERA.axes()
    tangent = math.tan(CAMERA.fov / 2)
    a, b = (2 * x - 1) * tangent, (1 - 2 * y) * tangent
    d = [f + a * r + b * u for f, r, u in zip(forward, right, up, strict=True)]
    t = (height - position[2]) / min(d[2], -0.05)
    return position[0] + t * d[0], position[1] + t * d[1], 0.5 / (tangent * t)


def place(shape: str, box: tuple[float, float, float, float]) -> tuple[str, float, float]:
    """Size and floor position (right, away) of a solid whose picture fills the box, for the usual camera."""
    best = (math.inf, SIZES[0], 0.0, 0.0)
    for size, radius in RADIUS.items():
        tall, wide = HALF_HEIGHT[shape] * radius, HALF_WIDTH[shape] * radius
        right, away, scale = _ray((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, tall)
        if shape in {"sphere", "capsule"}:
            high = (tall - wide) * math.cos(CAMERA.elevation) + wide
        else:
            high = tall * math.cos(CAMERA.elevation) + wide * math.sin(CAMERA.elevation)
        across = 0.95 * wide if shape == "cube" else wide  # a cube is widest only when seen on its edge
        error = abs(math.log((box[2] - box[0]) / (2 * across * scale))) + abs(
            math.log((box[3] - box[1]) / (2 * high * scale))
        )
        best = min(best, (error, size, right, away))
    return best[1], best[2], best[3]


def _widest(bottom: float) -> float:
    """Width in the picture of the widest solid whose lower edge is at `bottom`, with a little room."""
    return 2.15 * max(HALF_WIDTH.values()) * _ray(0.5, bottom, 0.0)[2]


def region_features(features: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
    """A region as a row: its crop (own pixels, brightness, chroma, other objects; 16×16 each) and ten numbers.

    The crop is square, a little larger than the region, and keeps its proportions.
    """
    left, top, right, bottom = (SIDE * edge for edge in box_of(mask))
    half = 0.56 * max(right - left, bottom - top)
    line = torch.linspace(-1, 1, CROP) * half
    x = ((left + right) / 2 + line) / SIDE * 2 - 1
    y = ((top + bottom) / 2 + line) / SIDE * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x[None], y[:, None]), dim=-1)[None]  # (1, 16, 16, 2)
    own = mask.float()
    bright, chroma = features[0], features[3:5].norm(dim=0)
    inside, tones = bright[mask], chroma[mask]
    planes = [
        own,
        own * (bright - inside.mean()) / (inside.std() + 0.1),
        own * (chroma - tones.mean()),
        ((classes > 0) & ~mask).float(),
    ]
    crop = F.grid_sample(torch.stack(planes)[None], grid, align_corners=False)[0]
    quantiles = torch.quantile(inside, torch.tensor([0.02, 0.25, 0.5, 0.75, 0.98]))
    others = [
        inside.std(),
        tones.std(),
        torch.tensor(math.log(right - left)),
        torch.tensor(math.log(bottom - top)),
    ]
    fill = own.sum() / max(1.0, (right - left) * (bottom - top))
    return torch.cat([crop.flatten(), 2 * torch.stack([*quantiles, *others, fill])])


def load_analytic(folder: Path | None = None) -> AnalyticDetector:
    """The analytic detector with the constants that ship in the package, or those in `folder`."""
    return AnalyticDetector(load_tensors((folder or weights_folder()) / "analytic.safetensors"))
