"""Made-up latents under the name that tests use."""

from diffusion.made_up import ENCODING, key_of, make_store, smooth, stage

__all__ = ["ENCODING", "key_of", "make_store", "smooth", "stage"]
