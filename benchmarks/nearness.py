"""How far the same pictures are from each other in bf16 and in fp32: what the bounds of `sfumato replay` come from."""

from __future__ import annotations

import sys

import torch
from common import arguments, keep, probe, show

from sfumato.generate import load
from sfumato.receipts.replay import FURTHEST, NEAR_SHARE, PATCH, difference
from sfumato.types import Request

PROMPTS = (
    "a red metal sphere behind a small blue cube",
    "a yellow cone",
    "two green rubber cylinders and a small purple cube",
    "a large blue metal sphere in front of a red cube",
    "a cyan torus to the left of a gray metal cube",
    "a small white cube on the floor at night",
)
ASKED = ({"steps": 8}, {"steps": 4}, {"guidance": 7.0})
SHARES = (0.5, 0.75, 0.9, 0.95, 1.0)
SEED, COUNT = 3, 4


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("-m", "--model", default="pocket", help="the packaged one by default")
    given = parser.parse_args()
    models = [load(given.model, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    found = []
    for prompt in PROMPTS:
        for asked in ASKED:
            request = Request(prompt, seed=SEED, count=COUNT, **asked)
            pairs = zip(*(model.generate(request).images for model in models), strict=True)
            found += [difference(*pair) for pair in pairs]
    known = [one for one in found if one is not None]
    rows = []
    for what, name, bound in (
        ("furthest value, of 255", "most", FURTHEST),
        ("share of values off by more", "far", NEAR_SHARE),
        ("worst square, of 255", "patch", PATCH),
    ):
        values = sorted(getattr(one, name) for one in known)
        for share in SHARES:
            at = values[round(share * (len(values) - 1))]
            rows.append((f"{what}, {share:.0%}", f"{at:.4g}", f"bound {bound:g}"))
    near = sum(one.verdict != "different" for one in known)
    show(f"{given.model}: {near} of {len(known)} pictures are near in bf16", probe(), rows)
    keep(given.json, {"near": near, "pictures": [one.to_dict() for one in known]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
