"""Drawing from a picture: what it takes beyond sampling from noise.

    canvas.py   in pixels: sizes, masks, what is drawn on, and the finished picture put together
    latent.py   in latents: where on the schedule to begin, what to keep, how to enlarge
    pixels.py   between pictures and what networks see

No model is known here; `drawing/` composes these with the stages.
"""
