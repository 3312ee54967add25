"""Reports of simulations: one HTML file that stands by itself, and miss-ratio curves as a picture."""
