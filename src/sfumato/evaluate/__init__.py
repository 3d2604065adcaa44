"""How good are the pictures: detectors, scores, statistics and reports."""
