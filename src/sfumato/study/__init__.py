"""Studies: many trainings that differ in one thing, measured alike. `compression` asks what the latents are worth."""
