"""Where the state of an optax chain is laid out."""
