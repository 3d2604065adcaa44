"""Building blocks that networks share: attention, norms, embeddings, transformer blocks, and the DiT."""
