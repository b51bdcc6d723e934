"""Text-to-image latent diffusion: everything meets at D(x; sigma, cond). docs/house.md has the file map."""
