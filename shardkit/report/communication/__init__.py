"""The collectives of a compiled program: the ledger, and the minima it is compared with."""
