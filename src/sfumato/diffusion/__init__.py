"""The mathematics of diffusion, apart from any network and any sampler.

path              how signal and noise are mixed at each level: VE, VP, FLOW
parameterization  what a network predicts (eps, v, x, flow) and how that becomes a denoiser
guidance          denoisers made from denoisers: classifier-free guidance, its interval and its rescale
schedules         which noise levels a sampler visits
loss              which noise levels training visits, and how much each counts
exact             data whose best denoiser is known, to test samplers against
"""
