"""Finding what in a picture may not survive: text lines, periodic patterns, thin lines, small objects, faces."""
