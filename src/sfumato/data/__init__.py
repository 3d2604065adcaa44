"""Pictures and captions on their way into training: folders, archives, scenes, buckets and cached latents."""
