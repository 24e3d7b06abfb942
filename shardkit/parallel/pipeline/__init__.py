"""Pipeline parallelism: layers in stages, worked through by a tick table."""
