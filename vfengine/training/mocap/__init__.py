"""Rendered motion capture: recorded human motions on dressed figures, in rooms and on lawns.

Content (clothes, hair, skin, place, light, view) is random and has names; motion is the class. This
is not real video, and there is only one performance of each action.
"""

from .motions import ACTIONS, SECONDS
from .renderer import Renderer, render_clips
from .scenes import Scene, draw_scene

# To be raised with every change of pixels or captions: files that keep them are named after it.
VERSION = 3

__all__ = ["ACTIONS", "SECONDS", "VERSION", "Renderer", "Scene", "draw_scene", "render_clips"]
