"""What stands behind the figure: camera, room or lawn, and the figure's shadow on the floor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .figure import RADII
from .scenes import COLOURS, LIGHTS, WALLS, Scene

_FIELD_OF_VIEW = 36.0  # degrees
_TARGET = 0.86  # metres above the floor that the camera looks at
_WALL = -1.6  # metres from the figure to the wall behind it


def root(x: Tensor) -> Tensor:
    """The square root of fp32, rounded correctly: as a GPU does, and torch on a CPU does not."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


class Camera:
    """The cameras of C scenes, and the direction that light comes from; float64.

    eye [C, 3] in metres; axes [C, 3, 3]: right, up and forward of the camera
    sun, up [C, 3]: towards the light and upwards, in the camera's axes
    focal: of a picture of height 1
    """

    def __init__(self, scenes: Sequence[Scene]) -> None:
        yaw, elevation = np.radians([(s.yaw, s.elevation) for s in scenes]).T
        back = np.stack(
            [np.sin(yaw) * np.cos(elevation), np.sin(elevation), np.cos(yaw) * np.cos(elevation)], 1
        )
        distance = np.array([s.distance for s in scenes])
        self.eye = np.array([0, _TARGET, 0]) + distance[:, None] * back
        right = np.cross([0.0, 1.0, 0.0], back)
        right /= np.linalg.norm(right, axis=1, keepdims=True)
        self.axes = np.stack([right, np.cross(back, right), -back], 1)
        self.focal = 0.5 / np.tan(np.radians(_FIELD_OF_VIEW / 2))
        sun = np.array([(s.light_side, 1.3, 0.9) for s in scenes])
        self.sun_in_room = sun / np.linalg.norm(sun, axis=1, keepdims=True)
        self.sun = np.einsum("cij,cj->ci", self.axes, self.sun_in_room)
        self.up = self.axes[:, :, 1]

    def sees(self, points: np.ndarray, num_frames: int) -> np.ndarray:
        """Points [C * num_frames, ..., 3] of the room in the axes of their clip's camera."""
        eye = self.eye.repeat(num_frames, 0).reshape(-1, *[1] * (points.ndim - 2), 3)
        axes = self.axes.repeat(num_frames, 0)
        return np.einsum("fij,f...j->f...i", axes, points - eye)


class Backdrop:
    """Rooms and lawns of C scenes, drawn once a clip.

    rays: [3, C, n, n], the colour along each ray, n = rays_per_pixel * size
    mean: [C, 3, size, size], the colour of each pixel
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        camera: Camera,
        size: int,
        rays_per_pixel: int,
        device: torch.device,
    ) -> None:
        n = size * rays_per_pixel

        def per_clip(values) -> Tensor:
            return torch.tensor(np.array(values), dtype=torch.float32, device=device)[:, None, None]

        def names(choice, key) -> Tensor:
            """[3, C, 1, 1], the colours that scenes name."""
            table = np.array([choice.get(key(s), (0, 0, 0)) for s in scenes]) / 255
            return torch.tensor(table.T, dtype=torch.float32, device=device)[:, :, None, None]

        u = (torch.arange(n, device=device, dtype=torch.float32) + 0.5 - n / 2) * (
            1 / (camera.focal * n)
        )
        ax = torch.tensor(camera.axes, dtype=torch.float32, device=device)[..., None, None]
        d = [u * ax[:, 0, i] - u[:, None] * ax[:, 1, i] + ax[:, 2, i] for i in range(3)]
        norm = root(d[0] * d[0] + d[1] * d[1] + d[2] * d[2])
        dx, dy, dz = (part / norm for part in d)  # [C, n, n]
        ex, ey, ez = (per_clip(camera.eye[:, i]) for i in range(3))
        outdoors = per_clip([s.place == "lawn" for s in scenes]).bool()

        floor_at = torch.where(dy < -1e-4, -ey / dy, torch.inf)
        wall = torch.where(outdoors, -40.0, _WALL)
        wall_at = torch.where(dz < -1e-4, (wall - ez) / dz, torch.inf)
        is_floor = floor_at < wall_at
        t = torch.minimum(floor_at, wall_at).clamp(max=80)
        x, y, z = ex + dx * t, ey + dy * t, ez + dz * t
        shift = [per_clip([s.shift[i] for s in scenes]) for i in range(2)]

        floor = torch.empty(3, *t.shape, device=device, dtype=torch.float32)
        behind = torch.empty_like(floor)
        groups = {p: [i for i, s in enumerate(scenes) if s.place == p] for p in _FLOORS}
        carpet = names(COLOURS, lambda s: s.carpet)
        for place, members in groups.items():
            if members:
                a, b = (s[members] for s in shift)
                args = (x[members], z[members], t[members], a, b, carpet[:, members])
                floor[:, members] = _FLOORS[place](*args)
        rooms = [i for i, s in enumerate(scenes) if s.place != "lawn"]
        lawns = groups["lawn"]
        if rooms:
            behind[:, rooms] = _room_wall(names(WALLS, lambda s: s.wall)[:, rooms], y[rooms])
        if lawns:
            a, b = (s[lawns] for s in shift)
            behind[:, lawns] = _sky_and_hills(dx[lawns], dy[lawns], a, b)
        # a little darker away from the figure
        floor *= 0.80 + 0.20 * torch.exp(-(x * x + z * z) / 4)
        tints = np.array([LIGHTS[s.light][0] for s in scenes])
        strength = np.array([0.55 + LIGHTS[s.light][1] for s in scenes])[:, None]
        tint = torch.tensor((tints * strength).T, dtype=torch.float32, device=device)
        self.rays = (torch.where(is_floor, floor, behind) * tint[:, :, None, None]).clamp_(0, 1)
        means = F.avg_pool2d(self.rays, rays_per_pixel)
        self.mean = means.transpose(0, 1).contiguous()

        # shadows are soft: they are computed at one point for 2 x 2 pixels
        step = 2 * rays_per_pixel
        points = (slice(None), slice(step // 2, None, step), slice(step // 2, None, step))
        self._x, self._z, self._sun = x[points], z[points], camera.sun_in_room
        half = rays_per_pixel // 2
        self._is_floor = is_floor[:, half::rays_per_pixel, half::rays_per_pixel]

    def shadows(self, ends: Tensor, clip: Tensor, strength: float) -> Tensor:
        """The light [F, s, s] that reaches each pixel, 1 outside shadows and off the floor.

        ends: [F, P, 2, 3] of the figure's cones in the room; clip: int64 [F]

        A cone's shadow is that of a segment, the softer the higher it is.
        """
        sun = torch.tensor(self._sun, dtype=torch.float32, device=ends.device)[clip]
        slope = (sun[:, [0, 2]] / sun[:, 1:2])[:, None, None]  # [F, 1, 1, 2]
        on_floor = ends[..., [0, 2]] - slope * ends[..., 1:2]  # [F, P, 2, 2]
        soft = 0.03 + 0.06 * ends[..., 1].sum(-1)  # [F, P]
        radii = RADII.mean(1)
        px, pz = self._x[clip], self._z[clip]
        light = torch.ones_like(px)

        def column(values: Tensor) -> Tensor:
            return values[:, None, None]

        for part in range(ends.shape[1]):
            a, b = on_floor[:, part, 0], on_floor[:, part, 1]
            ab = b - a
            inverse = 1 / ((ab * ab).sum(1) + 1e-8)
            qx, qz = px - column(a[:, 0]), pz - column(a[:, 1])
            share = qx * column(ab[:, 0] * inverse) + qz * column(ab[:, 1] * inverse)
            share = share.clamp_(0, 1)
            qx -= share * column(ab[:, 0])
            qz -= share * column(ab[:, 1])
            gap = (qx * qx + qz * qz).sqrt_() - radii[part]
            gap *= column(0.5 / soft[:, part])
            light = torch.minimum(light, gap)
        light = (light + 0.5).clamp_(0, 1)
        light = F.interpolate(light[:, None], scale_factor=2, mode="bilinear")[:, 0]
        return torch.where(self._is_floor[clip], 1 - strength + strength * light, 1.0)


# -- floors, by place: (x, z in metres, distance, two shifts, carpet's colour) -> [3, C, n, n] -----


def _wood(x, z, t, a, b, carpet) -> Tensor:
    across = z * (1 / 0.22) + a
    row = across.floor()
    lengthwise = x * (1 / 1.3) + row * 0.37 + b
    board = lengthwise.floor()
    # a number between 0 and 1 for each board
    tone = ((row * 37 + board * 91).remainder(17) * 5).remainder(17) / 17
    gap = ((across - row) < 0.06) | ((lengthwise - board) < 0.012)
    return _rgb(0.66, 0.46, 0.28, x) * (0.85 + 0.25 * tone - 0.25 * gap)


def _tiles(x, z, t, a, b, carpet) -> Tensor:
    odd = ((x * (1 / 0.45) + a).floor() + (z * (1 / 0.45) + b).floor()).remainder(2)
    return _rgb(0.80, 0.80, 0.78, x) * (1 - 0.28 * odd)


def _carpet(x, z, t, a, b, carpet) -> Tensor:
    return (carpet * 0.85).expand(-1, *x.shape)


def _lawn(x, z, t, a, b, carpet) -> Tensor:
    blades = (
        0.5
        + 0.25 * torch.sin(x * 5.1 + 3 * torch.sin(z * 3.7 + a * 9))
        + 0.25 * torch.sin(z * 6.3 + 2 * torch.sin(x * 4.1 + b * 9))
    )
    return _rgb(0.40, 0.62, 0.28, x) * (0.82 + 0.3 * blades / (1 + 0.05 * t * t))


_FLOORS = {"wood": _wood, "tiles": _tiles, "carpet": _carpet, "lawn": _lawn}


def _room_wall(colour: Tensor, y: Tensor) -> Tensor:
    """A wall that is lighter towards the ceiling, with a skirting board."""
    wall = colour * (0.90 + 0.05 * y.clamp(0, 2))
    return torch.where(y < 0.12, _rgb(0.88, 0.87, 0.84, y), wall)


def _sky_and_hills(dx: Tensor, dy: Tensor, a: Tensor, b: Tensor) -> Tensor:
    height = (dy * 3).clamp(0, 1)
    sky = (1 - height) * _rgb(0.80, 0.88, 0.95, dy) + height * _rgb(0.38, 0.60, 0.90, dy)
    ridge = 0.035 + 0.03 * torch.sin(dx * 5 + a * 9) + 0.012 * torch.sin(dx * 17 + b * 9)
    # A sine is rounded in other ways on other devices: so the ridge is a slope, about a ray wide.
    hills = ((ridge - dy) * 400 + 0.5).clamp(0, 1)
    return hills * _rgb(0.42, 0.56, 0.42, dy) + (1 - hills) * sky


def _rgb(red: float, green: float, blue: float, like: Tensor) -> Tensor:
    """[3, 1, 1, 1] on the device of another tensor."""
    return torch.tensor([red, green, blue], device=like.device, dtype=torch.float32).view(
        3, 1, 1, 1
    )
