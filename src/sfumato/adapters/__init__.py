"""LoRAs and their kin: files of every common format as one representation, folded into the weights of a network."""
