"""Context parallelism: the length of every row split over a mesh axis."""
