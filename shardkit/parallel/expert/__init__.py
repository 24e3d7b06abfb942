"""Expert parallelism: experts split over a mesh axis, tokens exchanged."""
