"""How a model's stages become pictures: what `Model` in `generate.py` does, one idea a file.

    request.py   a request made whole: what is open filled in, what only the model can know checked
    script.py    what a network is told, also where prompts change over the steps or are several
    denoise.py   a network, what it is told and guidance, made into a denoiser
    control.py   ControlNets that act in a drawing, and what they add together
    finite.py    stopping where a network gives NaN or infinity, by the name of its layer
    sample.py    from noise, or from a picture, to a latent: by one model or by two, in one pass or in two

Each works on an open `Model` and keeps nothing.
"""
