"""Build checked datasets from clinical images: the `data_prep` command."""
