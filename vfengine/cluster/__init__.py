"""Generation and serving on Ray: what runs on which machine, and what travels between them.

Ray places the workers, starts lost ones again and carries base paths. Nothing here imports torch
or Ray before it is needed.
"""
