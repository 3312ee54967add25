"""Where expert bytes live and how they move: the host arena, the disk reader, and how much memory there is."""
