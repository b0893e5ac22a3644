"""Made-up latents under the name that tests use."""

from diffusion.data import key_of, make_store, stage
from diffusion.data.synthetic_store import ENCODING, smooth

__all__ = ["ENCODING", "key_of", "make_store", "smooth", "stage"]
