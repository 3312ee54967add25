"""How each predictor is trained: one recipe a file, of the predictor's name."""
