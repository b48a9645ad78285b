"""What VideoFusion's paper measured (arXiv 2303.08320, Table 4), over VDM*."""

LATENCY, MEMORY = 0.425, 0.781
