"""What a latent is: records, Zarr layout, manifest, snapshots, keys, statistics."""
