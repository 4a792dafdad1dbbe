"""One file a family of latent diffusion models; `registry.families` finds them here."""
