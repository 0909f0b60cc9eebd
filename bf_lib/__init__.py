"""BitsFusion, open and reproducible: 1.99-bit weights for the Stable Diffusion UNet."""
