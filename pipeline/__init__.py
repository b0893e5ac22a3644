"""Archive to latents and back to DICOM: reading, pairing, windowing, the VAE, decoding, evaluation."""
