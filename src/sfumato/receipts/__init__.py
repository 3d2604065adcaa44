"""What a picture cost and where it came from: FLOPs, time, memory, the machine's peak, and recipes inside files."""
