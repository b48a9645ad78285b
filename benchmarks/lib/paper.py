"""The ratios to VDM* in VideoFusion's paper (arXiv 2303.08320, Table 4)."""

LATENCY, MEMORY = 0.425, 0.781
