"""Stable Video Diffusion: a picture set in motion."""
