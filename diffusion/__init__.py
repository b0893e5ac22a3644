"""Latent diffusion: U-Net, objectives, streaming, training, sampling. Knows nothing of DICOM or HU."""
