"""One pass of Stable Diffusion 3's transformer, guided (batch 2), by ours, by diffusers and by OpenVINO, interleaved.

--blocks takes fewer of its joint blocks, which are nearly all of its time and memory: a pass of all 24 in bfloat16 at
1024² is 18 TFLOP.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from common import arguments
from denoiser import Inputs, Subject, add_arguments, installed, measure
from torch import Tensor, nn

from sfumato.families.sd3.folder import transformer_config
from sfumato.families.sd3.shapes import SYSTEMS
from sfumato.nn.attention import as_two
from sfumato.nn.mmdit import KEPT, MMDiT, MMDiTConfig

CLIP, T5 = 77, 256  # tokens of each


def diffusers_network(config: MMDiTConfig) -> nn.Module:
    """diffusers' network of that shape with random weights."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel.from_config(transformer_config(config, 128)).eval()


def ask(network: nn.Module, inputs: Inputs) -> Tensor:
    return network(inputs["x"], inputs["context"], inputs["vector"], inputs["time"]).sample


def main() -> None:
    parser = arguments(__doc__)
    add_arguments(parser, 512)
    parser.add_argument("--kind", choices=SYSTEMS, default="sd3-medium", help="whose (default sd3-medium)")
    parser.add_argument(
        "--blocks", type=int, default=4, help="joint blocks (default 4); 24 are all of a medium one"
    )
    parser.add_argument(
        "--without-t5", action="store_true", help="its tokens are zeros, told to ours as two for all"
    )
    args = parser.parse_args()
    whole = SYSTEMS[args.kind].transformer
    config = replace(whole, layers=args.blocks, dual=tuple(n for n in whole.dual if n < args.blocks))
    torch.manual_seed(1)
    cells = args.size // 8
    inputs = {
        "x": torch.randn(args.batch, config.channels, cells, cells),
        "time": torch.full((args.batch,), 500.0),
        "context": torch.randn(args.batch, CLIP + T5, config.context),
        "vector": torch.randn(args.batch, config.pooled),
    }
    own = inputs
    if args.without_t5:
        inputs["context"][:, CLIP:] = 0
        counts = torch.tensor([1.0] * CLIP + list(as_two(T5))).expand(args.batch, -1)
        own = inputs | {"context": inputs["context"][:, : CLIP + 2], "mask": counts}
    theirs = (lambda: diffusers_network(config)) if installed("diffusers") else None
    title = f"Transformer of {args.kind} with {args.blocks} of {whole.layers} blocks"
    title += " and without T5" if args.without_t5 else ""
    subject = Subject(title, lambda: MMDiT(config), theirs, inputs, own, ask, maps=False, kept=KEPT)
    measure(subject, args, {"kind": args.kind, "blocks": args.blocks, "without_t5": args.without_t5})


if __name__ == "__main__":
    main()
