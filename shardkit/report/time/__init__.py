"""FLOPs, memory traffic and a modelled timeline of a compiled step."""
