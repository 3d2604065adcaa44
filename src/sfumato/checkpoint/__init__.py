"""Files of weights: headers, tensors read on demand, names made ours, strict filling. Knows no family."""
