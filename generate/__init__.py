"""How models make images, and attention processors for diffusers; the optional part `generate`."""
