"""What `sfumato generate` can be told, in the order of its help: each option's type, its name and its help.

The values of requests are text here; `cli.parse` makes numbers, sizes and pictures of them, with errors that name them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

PICTURE, MASK, CONTROL, LARGER, FASTER, PROMPT, TUNING, WEIGHTS = (
    "Beginning with a picture",
    "Painting a part of it",
    "Drawing after a control picture",
    "Drawing it larger",
    "Drawing faster, not quite the same picture",
    "How a checkpoint reads a prompt",
    "For those who know",
    "Opening a checkpoint",
)
MANY = "Many pictures"

Prompt = Annotated[str | None, Argument(help="What to draw; may be empty.")]
Output = Annotated[
    Path,
    Option("-o", "--output", help="A .png, .jpg or .webp file; several become name-0, name-1 …"),
]
Count = Annotated[str, Option("-n", "--count", metavar="N", help="How many pictures.")]
Seed = Annotated[str, Option(metavar="N", help="Picture k is the picture of seed + k.")]
Steps = Annotated[str | None, Option(metavar="N", help="Sampling steps.")]
Guidance = Annotated[str | None, Option(metavar="X", help="How strictly to follow the prompt.")]
Sampler = Annotated[str | None, Option(metavar="NAME", help="See `sfumato models`.")]
Schedule = Annotated[str | None, Option(metavar="NAME", help="See `sfumato models`.")]
Size = Annotated[str | None, Option(metavar="WxH", help="Pixels: 128 or 128x96.")]
Negative = Annotated[
    str | None,
    Option(
        metavar="TEXT",
        help="What to stay away from. `--negative ''` is the empty text, which some models tell from no --negative "
        "at all.",
    ),
]
Model = Annotated[
    str | None,
    Option("-m", "--model", help="Name, folder, .safetensors file, or org/name."),
]
Like = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        help="Take prompt and settings from a picture that says how it was made, by sfumato or by a web UI. "
        "What you give beside it wins.",
    ),
]
Image = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        rich_help_panel=PICTURE,
        help="A PNG, JPEG or WebP to begin with instead of noise. The result has its size.",
    ),
]
Strength = Annotated[
    str | None,
    Option(
        metavar="X",
        rich_help_panel=PICTURE,
        help="How much of the picture to redraw: 0 keeps it, 1 forgets it. 0.75 by default, 1 in a mask.",
    ),
]
Fit = Annotated[
    str | None,
    Option(
        metavar="HOW",
        rich_help_panel=PICTURE,
        help="Bring it to --size: cover (crop what is too long), contain (extend its edges) or stretch.",
    ),
]
Outpaint = Annotated[
    str | None,
    Option(
        metavar="PIXELS",
        rich_help_panel=PICTURE,
        help="Draw on beyond its borders: 64 on every side, or LEFT,TOP,RIGHT,BOTTOM such as 0,0,128,0.",
    ),
]
Mask = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        rich_help_panel=MASK,
        help="A picture of the same size, white where to paint. The rest comes back untouched "
        "(in a .png or .webp).",
    ),
]
MaskBlur = Annotated[
    str | None,
    Option(
        metavar="PIXELS",
        rich_help_panel=MASK,
        help="How softly the painted part begins, inside the mask; 4 by default.",
    ),
]
OnlyMasked = Annotated[
    str | None,
    Option(
        metavar="PIXELS",
        rich_help_panel=MASK,
        help="Draw only the mask and this many pixels around it, at full --size, and put them back: "
        "for details of a large picture.",
    ),
]
Paste = Annotated[
    bool | None,
    Option(
        "--paste/--no-paste",
        show_default=False,
        rich_help_panel=MASK,
        help="Whether what lies outside the mask is taken from your picture; it is by default.",
    ),
]
Control = Annotated[
    list[str] | None,
    Option(
        metavar="KIND=IMAGE[:WEIGHT[:START-END]]",
        rich_help_panel=CONTROL,
        help="A picture for the ControlNet called KIND: canny=photo.png:0.8:0-0.6 acts with this weight in this share "
        "of the steps. Edges (canny, softedge) are made of a plain picture, depth and poses by an --annotator; others "
        "are taken as they are. May be repeated. `none` takes them out of --like.",
    ),
]
ControlNet = Annotated[
    list[str] | None,
    Option(
        "--controlnet",
        metavar="KIND=FILE",
        rich_help_panel=CONTROL,
        help="A ControlNet (.safetensors, a folder, or org/name of the Hub) and what --control calls it; may be "
        "repeated.",
    ),
]
Annotator = Annotated[
    list[str] | None,
    Option(
        metavar="KIND=FOLDER",
        rich_help_panel=CONTROL,
        help="A network that makes the picture for this kind of a plain one: DPT or Depth Anything for depth, VitPose "
        "for poses (a folder of transformers, or org/name of the Hub); may be repeated.",
    ),
]
ControlReady = Annotated[
    list[str] | None,
    Option(
        metavar="KIND",
        rich_help_panel=CONTROL,
        help="Take the picture for this kind as it is: it shows edges already.",
    ),
]
Guess = Annotated[
    bool | None,
    Option(
        "--guess/--no-guess",
        show_default=False,
        rich_help_panel=CONTROL,
        help="Let control pictures act on the prompt's half of guidance alone, for prompts that say nothing.",
    ),
]
Hires = Annotated[
    str | None,
    Option(
        metavar="SCALE",
        rich_help_panel=LARGER,
        help="Draw, enlarge by this factor, and draw over it: more detail than drawing large at once. "
        "`none` takes it out of --like.",
    ),
]
HiresStrength = Annotated[
    str | None,
    Option(
        metavar="X",
        rich_help_panel=LARGER,
        help="How much the second pass redraws; 0 only enlarges. 0.5 by default.",
    ),
]
HiresSteps = Annotated[
    str | None,
    Option(metavar="N", rich_help_panel=LARGER, help="Its steps; as many as --steps by default."),
]
Upscaler = Annotated[
    str | None,
    Option(
        metavar="NAME",
        rich_help_panel=LARGER,
        help="lanczos enlarges the picture; latent-bilinear, latent-bicubic, latent-nearest the latent, "
        "which wants a strength above 0.5.",
    ),
]
Reuse = Annotated[
    str | None,
    Option(
        metavar="N",
        rich_help_panel=FASTER,
        help="Of N calls of the network in a row only the first computes its deep features; 1 is exact.",
    ),
]
GuidanceInterval = Annotated[
    str | None,
    Option(
        metavar="LOW:HIGH",
        rich_help_panel=FASTER,
        help="Guide only where LOW < sigma <= HIGH; elsewhere a step costs half. Sigma goes to 0, from 1 in flow "
        "models and from 14 or more in others. `none` takes it out of --like.",
    ),
]
Variation = Annotated[
    str | None,
    Option(
        metavar="SEED:X",
        rich_help_panel=TUNING,
        help="Pictures like that of --seed: mix in the noise of a second seed, 0 not at all, 1 altogether. "
        "With -n the second seed counts up. `none` takes it out of --like.",
    ),
]
Eta = Annotated[
    str | None,
    Option(
        metavar="X",
        rich_help_panel=TUNING,
        help="Fresh noise in samplers that have it (ddim, euler_a …), from 0 to 1.",
    ),
]
ClipSkip = Annotated[
    str | None,
    Option(
        metavar="N",
        rich_help_panel=PROMPT,
        help="Layer of a CLIP text encoder, counted from the last, which is 1.",
    ),
]
PromptRules = Annotated[
    str | None,
    Option(
        metavar="NAME",
        rich_help_panel=PROMPT,
        help="What brackets and signs mean: a1111 (the default), comfy, compel, or none.",
    ),
]
Weighting = Annotated[
    str | None,
    Option(
        metavar="NAME",
        rich_help_panel=PROMPT,
        help="What a weight does: a1111, a1111_no_norm, comfy, compel or none; as the rules have it by default.",
    ),
]
TextLength = Annotated[
    str | None,
    Option(
        metavar="N",
        rich_help_panel=PROMPT,
        help="Tokens that a text encoder without windows reads at least, up to 512; 256 by default. A longer "
        "prompt is read whole.",
    ),
]
SkipLayers = Annotated[
    str | None,
    Option(
        metavar="N,N…",
        rich_help_panel=TUNING,
        help="Guide away from what the network draws without these layers, counted from 0; the model's "
        "card says which, such as 7,8,9. `none` takes it out of --like.",
    ),
]
SkipScale = Annotated[
    str | None, Option(metavar="X", rich_help_panel=TUNING, help="How strictly to do so; 2.8 by default.")
]
SkipInterval = Annotated[
    str | None,
    Option(
        metavar="START:STOP",
        rich_help_panel=TUNING,
        help="In which share of the steps; 0.01:0.2 by default.",
    ),
]
Micro = Annotated[
    list[str] | None,
    Option(
        metavar="NAME=VALUE",
        rich_help_panel=PROMPT,
        help="What a model that reads sizes is told: original=4096x4096, crop=LEFT,TOP, target=1024x1024, aesthetic=6 "
        "(a refiner), each also as negative-…; may be repeated. `none` takes it out of --like.",
    ),
]
Embedding = Annotated[
    list[str] | None,
    Option(
        metavar="[NAME=]FILE",
        rich_help_panel=PROMPT,
        help="A textual inversion (.safetensors), called in prompts by the file's name or the one given; "
        "may be repeated.",
    ),
]
Lora = Annotated[
    list[str] | None,
    Option(
        metavar="FILE[:X]",
        rich_help_panel=TUNING,
        help="A LoRA and its weight, 1 by default; FILE:0.8:down.1=0.5,mid=0,text=0 weighs parts of the networks, and "
        "NAME=FILE names it. May be repeated. `none` takes them out of --like.",
    ),
]
LoraPartial = Annotated[
    bool,
    Option(
        "--lora-partial",
        rich_help_panel=TUNING,
        help="Use what fits of a LoRA and say what is left, instead of refusing it.",
    ),
]
Refiner = Annotated[
    str | None,
    Option(
        metavar="MODEL[:X]",
        rich_help_panel=WEIGHTS,
        help="A second model that finishes the picture, after this share of the noise levels; 0.8 by default. "
        "`none` takes it out of --like.",
    ),
]
Parts = Annotated[
    list[Path] | None,
    Option(
        rich_help_panel=WEIGHTS,
        help="For a U-Net alone: the checkpoint whose autoencoder and text encoders go with it, or files with one "
        "each; may be repeated.",
    ),
]
Vae = Annotated[
    Path | None,
    Option(rich_help_panel=WEIGHTS, help="Another autoencoder for a checkpoint: a file or a folder."),
]
Dtype = Annotated[
    str | None,
    Option(
        metavar="NAME",
        rich_help_panel=WEIGHTS,
        help="Of a checkpoint's weights: fp32, bf16, fp16, or on a CPU int8.",
    ),
]
Without = Annotated[
    list[str] | None,
    Option(
        metavar="NAME",
        rich_help_panel=WEIGHTS,
        help="A text encoder to leave out, of a checkpoint that reads prompts with several; may be repeated. A wrong "
        "name is answered by those there are.",
    ),
]
TextDtype = Annotated[
    str | None,
    Option(
        metavar="NAME",
        rich_help_panel=WEIGHTS,
        help="Of the largest text encoder's weights: fp32, bf16 or int8, half of bf16's memory; as --dtype by default.",
    ),
]
Tokenizer = Annotated[
    Path | None,
    Option(
        rich_help_panel=WEIGHTS,
        help="The largest text encoder's tokenizer.json or spiece.model, where the checkpoint has none beside it.",
    ),
]
Engine = Annotated[
    str | None,
    Option(
        metavar="NAME",
        rich_help_panel=WEIGHTS,
        help="What runs a checkpoint's U-Net: torch, openvino or openvino:GPU.",
    ),
]
Prediction = Annotated[
    str | None,
    Option(metavar="NAME", rich_help_panel=WEIGHTS, help="epsilon or v, where a checkpoint does not say it."),
]
Preset = Annotated[
    str | None,
    Option(
        metavar="NAME",
        rich_help_panel=WEIGHTS,
        help="How a distilled checkpoint is drawn that does not say it: lcm, turbo or lightning; plain if it is none.",
    ),
]
Variant = Annotated[
    str | None,
    Option(metavar="NAME", rich_help_panel=WEIGHTS, help="Of a folder's files, such as fp16."),
]
Device = Annotated[str | None, Option(metavar="NAME", help="cpu or cuda; the faster one by default.")]
Plan = Annotated[
    bool,
    Option(
        "--plan",
        rich_help_panel=WEIGHTS,
        help="Say what memory the drawing would need, and draw nothing.",
    ),
]
Memory = Annotated[
    str | None,
    Option(
        metavar="SIZE",
        rich_help_panel=WEIGHTS,
        help="Memory that drawing may take, such as 6GB; what the machine has free by default.",
    ),
]
Offload = Annotated[
    str | None,
    Option(
        metavar="NAME",
        rich_help_panel=WEIGHTS,
        help="What stays in memory: none (all networks do), model (the one at work), sequential (of the U-Net one "
        "layer, read at each step). The first that fits by default. Pictures are the same.",
    ),
]
Preview = Annotated[
    bool,
    Option("--preview", help="Show the picture forming; beside the output if this is no terminal."),
]
Deterministic = Annotated[
    bool,
    Option(
        "--deterministic",
        help="Kernels that give the same numbers every time, and no measured seconds in the recipe: equal machines "
        "write equal bytes.",
    ),
]
Sign = Annotated[
    tuple[Path, Path] | None,
    Option(
        metavar="CERT KEY",
        help="Seal each file with a C2PA manifest: your chain of certificates and its private key, PEM files.",
    ),
]
AsJson = Annotated[bool, Option("--json", help="Answer with one JSON object.")]


def left_open(context: Context, name: str) -> bool:
    """Whether the option has its value by default, so that a picture to be like may give another."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT"


Prompts = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        rich_help_panel=MANY,
        help="Draw each line of a .txt, .jsonl or .csv file into the folder -o; what is there already is left.",
    ),
]
Ray = Annotated[
    str | None,
    Option(
        metavar="ADDRESS",
        rich_help_panel=MANY,
        help="Have it done by a Ray cluster: its address, or local (pip install 'sfumato\\[cluster]').",
    ),
]
Replicas = Annotated[
    str,
    Option(
        metavar="N", rich_help_panel=MANY, help="Of --ray: how many work at once, each with its own copy."
    ),
]
