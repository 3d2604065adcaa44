"""What the networks of Stable Diffusion 3 and 3.5 measure: the numbers that names and sizes of tensors follow from.

Sources: Esser et al. 2024 (arXiv 2403.03206), sec. 4; Stability-AI/sd3.5, sd3_infer.py and mmditx.py; the `config.json`
files of the published diffusers folders.
"""

from __future__ import annotations
