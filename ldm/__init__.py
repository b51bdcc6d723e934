"""Text-to-image latent diffusion: everything meets at D(x; sigma, cond). See README.md for the file map."""
