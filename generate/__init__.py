"""Image generation, and attention processors for diffusers; needs the optional part `generate`."""
