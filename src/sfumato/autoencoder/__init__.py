"""Pixels to latents and back: the network, its losses, its discriminator and the measures of a
reconstruction.
"""

from sfumato.autoencoder.discriminator import Discriminator, DiscriminatorConfig
from sfumato.autoencoder.losses import LossConfig
from sfumato.autoencoder.model import Autoencoder, AutoencoderConfig, Posterior

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "Discriminator",
    "DiscriminatorConfig",
    "LossConfig",
    "Posterior",
]
