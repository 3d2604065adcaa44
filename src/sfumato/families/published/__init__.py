"""What families of published checkpoints share: from files to parts and back, networks that come and go, plans."""
