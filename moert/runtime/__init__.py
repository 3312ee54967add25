"""The live cache: what one MoE layer does for one forward."""
