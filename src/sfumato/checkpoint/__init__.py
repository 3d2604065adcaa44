"""Files of weights: what their headers say, tensors read on demand, names made ours, strict filling. Knows no family."""
