"""Guesses at the experts the coming layers will ask for: the base class and one predictor a file."""
