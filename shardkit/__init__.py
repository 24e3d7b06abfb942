"""shardkit: declare a mesh and specs; compile, prove and run one SPMD training step in JAX."""
