"""Clips to train on: rendered mocap (`mocap.py`), or a folder of videos (`folder.py`)."""
