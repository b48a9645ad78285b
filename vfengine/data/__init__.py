"""Clips to train on: rendered mocap (`mocap.py`), or a folder of the user's own videos (`folder.py`)."""
