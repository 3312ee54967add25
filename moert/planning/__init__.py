"""Machines described in numbers, and what a model will need and do on one. Pure: no tensor, no clock."""
