"""Draws clips of dressed figures: rays meet round cones in closed form, in torch, on any device.

What depends on a whole frame (skeleton, camera) is computed in float64 on the CPU. What depends on
a pixel takes elementary operations of float32 alone, which every device rounds in the same way: so
a CPU and a GPU decide alike which surface a ray meets, and draw the same pixels. To divide by a
Python number is no such operation, as a GPU multiplies by its inverse: so the code does. Nor is
torch's root of float32 on a CPU, which is not always rounded right: `backdrop.root` is.

Most rays meet nothing. Candidates are pairs of a ray and a cone that the cone's silhouette covers;
only they are computed, in one flat list for all frames of a chunk. Each pixel has 2 x 2 rays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..arrays import gathered, kept
from .backdrop import Backdrop, Camera, root
from .figure import PARTS, RADII, colouring, cones
from .motions import ACTIONS, SECONDS, motions
from .scenes import COLOURS, LIGHTS, Scene, draw_scene

_RAYS = 2  # of a pixel, along each side
_CHUNK = {"cpu": 16, "cuda": 2048}  # frames at a time: what stays in a core's cache, or fills a GPU
_SHADOW = 0.45  # of the light that a shadow takes from the floor


class Renderer:
    """Draws square clips. Raises ImportError without pybullet, whose motion files it reads.

    size: height and width in pixels, an even number of at least 16
    """

    def __init__(
        self, size: int = 128, num_frames: int = 16, device: torch.device | str = "cpu"
    ) -> None:
        if size < 16 or size % 2:
            raise ValueError(f"Renderer: size must be even and at least 16, got {size}")
        if num_frames < 1:
            raise ValueError(f"Renderer: num_frames must be at least 1, got {num_frames}")
        self.size, self.num_frames, self.device = size, num_frames, torch.device(device)
        self.motions = motions()

    def clips(self, scenes: Sequence[Scene]) -> Tensor:
        """uint8 [M, N, H, W, 3]."""
        return self.frames(scenes, range(self.num_frames))

    @torch.no_grad()
    def frames(
        self, scenes: Sequence[Scene], chosen: Sequence[int], with_figure: bool = False
    ) -> Tensor:
        """The chosen frames of each clip alone, uint8 [M, len(chosen), H, W, 3].

        with_figure: with a fourth channel, the figure's share of each pixel, of 255
        """
        channels = 4 if with_figure else 3
        shape = (len(scenes), len(chosen), self.size, self.size, channels)
        out = torch.empty(shape, dtype=torch.uint8, device=self.device)
        per_chunk = max(1, _CHUNK[self.device.type] // len(chosen))
        for first in range(0, len(scenes), per_chunk):
            part = scenes[first : first + per_chunk]
            made = self._chunk(part, list(chosen))
            out[first : first + per_chunk] = made[..., :channels]
        return out

    def _chunk(self, scenes: Sequence[Scene], chosen: list[int]) -> Tensor:
        """Pixels and the figure's share of them, uint8 [M, len(chosen), H, W, 4]."""
        num_frames, size, device = len(chosen), self.size, self.device
        poses = np.concatenate([self._poses(scene, chosen) for scene in scenes])
        mirrored = np.repeat([scene.mirrored for scene in scenes], num_frames)
        ends = cones(poses, mirrored)  # [F, P, 2, 3]
        camera = Camera(scenes)
        backdrop = Backdrop(scenes, camera, size, _RAYS, device)
        clip = torch.arange(len(scenes), device=device, dtype=torch.int64).repeat_interleave(
            num_frames
        )

        light = backdrop.shadows(_to(ends, device), clip, _SHADOW)  # [F, s, s]
        picture = backdrop.mean[clip] * light[:, None]  # [F, 3, s, s]
        hits = _Hits(camera.sees(ends, num_frames), camera.focal, size * _RAYS, device)
        colour = self._shaded(hits, scenes, camera, num_frames)
        # a ray that meets the figure replaces its share of the backdrop
        row, column = hits.row // _RAYS, hits.column // _RAYS
        pixel = (hits.frame * size + row) * size + column
        side = size * _RAYS
        ray = (clip.index_select(0, hits.frame) * side + hits.row) * side + hits.column
        behind = backdrop.rays.flatten(1).index_select(1, ray)  # [3, T]
        change = (colour - behind * light.flatten().index_select(0, pixel)) / _RAYS**2
        planes = picture.new_zeros(4, light.numel())  # [4, F * s * s]
        planes[:3] = picture.transpose(0, 1).reshape(3, -1)
        share = torch.full_like(change[0], 1 / _RAYS**2)
        for plane, values in zip(planes, (*change, share), strict=True):
            plane.index_add_(0, pixel, values)
        pixels = (planes.clamp_(0, 1) * 255 + 0.5).to(torch.uint8)
        return pixels.view(4, len(scenes), num_frames, size, size).permute(1, 2, 3, 4, 0)

    def _poses(self, scene: Scene, chosen: list[int]) -> np.ndarray:
        """The poses of the chosen frames, [len(chosen), 44]."""
        motion, span = self.motions[scene.action], SECONDS[scene.action] * scene.speed
        latest = motion.duration if motion.periodic else max(motion.duration - span, 0.05)
        step = span / max(self.num_frames - 1, 1)
        return motion.at(scene.phase * latest + np.array(chosen) * step)

    def _shaded(
        self, hits: _Hits, scenes: Sequence[Scene], camera: Camera, num_frames: int
    ) -> Tensor:
        """RGB [3, T] of all hits: colour, light from one side and from everywhere, a highlight."""
        device, clip = self.device, hits.frame // num_frames
        table = _to(np.stack([colouring(scene) for scene in scenes]), device)  # [C, P, 8]
        stripes = np.array([COLOURS[scene.stripes or "grey"] for scene in scenes]) / 255
        table = torch.cat([table, _to(stripes, device)[:, None].expand(-1, len(PARTS), -1)], 2)
        columns = table.flatten(0, 1).T.index_select(1, clip * len(PARTS) + hits.part)  # [11, T]
        change, count = columns[6], columns[7]
        beyond = hits.along >= change
        striped = beyond & (count > 0) & ((hits.along * count).floor() % 2 == 1)
        colour = torch.where(beyond, columns[3:6], columns[:3])
        colour = torch.where(striped, columns[8:11], colour)

        sun, up = (_to(v.T, device).index_select(1, clip) for v in (camera.sun, camera.up))
        tint, ambient = _lights(scenes, device)
        tint, ambient = tint.T.index_select(1, clip), ambient.index_select(0, clip)
        nx, ny, nz = hits.normal
        facing = nx * sun[0] + ny * sun[1] + nz * sun[2]
        upward = nx * up[0] + ny * up[1] + nz * up[2]
        hx, hy, hz = (sun[axis] - hits.ray[axis] for axis in range(3))
        length = root(hx * hx + hy * hy + hz * hz)
        shine = ((nx * hx + ny * hy + nz * hz) / length).clamp(min=0)
        for _ in range(4):  # to the 16th
            shine = shine * shine
        shade = ambient * (0.75 + 0.35 * upward) + 0.75 * (facing * 0.85 + 0.15).clamp(min=0)
        # before rays are averaged, or highlights get jagged edges
        return (colour * shade * tint + 0.06 * shine).clamp_(0, 1)


class _Hits:
    """The surfaces that rays meet first, one a ray: T of them.

    frame, part, row, column   int64 [T]; rows and columns of rays
    ray, normal   three [T] each, in the camera's axes: right, up, forward
    along         [T], 0..1 from a cone's first end to its second
    """

    def __init__(self, ends: np.ndarray, focal: float, side: int, device: torch.device) -> None:
        """ends float64 [F, P, 2, 3]: the cones in the camera's axes, its eye in the origin."""
        num_frames, num_parts = ends.shape[:2]
        silhouettes, boxes = _silhouettes(ends, focal, side // _RAYS)
        cone, row, column = _candidates(_to(silhouettes, device), boxes.to(device))
        focal = focal * side

        # [2, 2, K]: the rays of the pixels of K candidates; what belongs to a cone is [K]
        rays = torch.arange(_RAYS, device=device, dtype=torch.int64)[:, None]
        row, column = (row * _RAYS + rays)[:, None], column * _RAYS + rays
        u = (column + 0.5 - side / 2) * (1 / focal)
        v = (side / 2 - 0.5 - row) * (1 / focal)
        norm = 1 / root(u * u + v * v + 1)
        rx, ry, rz = u * norm, v * norm, norm

        constants = _to(_constants(ends), device).index_select(1, cone)
        ax, ay, az, bx, by, bz, d2, e, k0, q1, q2, m1, m0 = constants
        along_axis = rx * bx + ry * by + rz * bz
        to_first = -(rx * ax + ry * ay + rz * az)
        k2 = d2 - along_axis * along_axis
        k1 = d2 * to_first - e * along_axis
        h = k1 * k1 - k0 * k2
        t = (-root(h.clamp(min=0)) - k1) / k2
        y = e + t * along_axis
        on_cone = (h >= 0) & (y > 0) & (y < d2)
        to_second = to_first - along_axis
        h1 = to_first * to_first - q1
        h2 = to_second * to_second - q2
        t1 = torch.where(h1 > 0, -to_first - root(h1.clamp(min=0)), torch.inf)
        t2 = torch.where(h2 > 0, -to_second - root(h2.clamp(min=0)), torch.inf)
        distance = torch.where(on_cone, t, torch.minimum(t1, t2))

        # the nearest hit of each ray; of equal ones the later part
        place = ((cone // num_parts * side + row) * side + column).flatten()
        distance = distance.flatten()
        nearest = torch.empty(num_frames * side * side, device=device, dtype=torch.float32)
        nearest.scatter_reduce_(0, place, distance, "amin", include_self=False)
        found = (distance == nearest.index_select(0, place)) & (distance < torch.inf)
        first = found.nonzero()[:, 0]
        place = place.index_select(0, first)
        last = torch.empty(num_frames * side * side, dtype=torch.int64, device=device)
        last.scatter_reduce_(0, place, first, "amax", include_self=False)
        first = first[last.index_select(0, place) == first]

        def keep(*values: Tensor) -> tuple[Tensor, ...]:
            return tuple(value.flatten().index_select(0, first) for value in values)

        candidate = first % len(cone)
        cone = cone.index_select(0, candidate)
        ax, ay, az, bx, by, bz, d2, *_, m1, m0 = constants.index_select(1, candidate)
        rows, columns = row.expand_as(y), column.expand_as(y)
        distance, y, self.row, self.column = keep(distance, y, rows, columns)
        on_cone, near_first = keep(on_cone, t1 <= t2)
        self.ray, along_axis = keep(rx, ry, rz), keep(along_axis)[0]
        # normal = scale * (point - first end) - share * (second - first end)
        scale = torch.where(on_cone, d2, 1.0)
        share = torch.where(on_cone, y, torch.where(near_first, 0.0, 1.0))
        axis, origin = (bx, by, bz), (ax, ay, az)
        normal = [
            scale * (r * distance - o) - share * b
            for r, o, b in zip(self.ray, origin, axis, strict=True)
        ]
        length = root(normal[0] ** 2 + normal[1] ** 2 + normal[2] ** 2)
        self.normal = tuple(n / length for n in normal)
        self.along = ((m1 + distance * along_axis) / m0).clamp(0, 1)
        self.frame, self.part = cone // num_parts, cone % num_parts


def _constants(ends: np.ndarray) -> np.ndarray:
    """What the intersection needs of each cone, float64 [13, F * P]; the eye is the origin.

    I. Quilez, "Intersectors" (round cone), with what does not depend on the ray taken out.
    """
    a, b = ends[..., 0, :].reshape(-1, 3), ends[..., 1, :].reshape(-1, 3)
    ra, rb = np.tile(RADII, (len(ends), 1)).T
    axis = b - a
    m0, m1 = (axis * axis).sum(1), -(axis * a).sum(1)
    m5, m7, rr = (a * a).sum(1), (b * b).sum(1), ra - rb
    d2 = m0 - rr * rr
    k0 = d2 * m5 - m1 * m1 + 2 * m1 * rr * ra - m0 * ra * ra
    rest = (d2, m1 - rr * ra, k0, m5 - ra * ra, m7 - rb * rb, m1, m0)
    return np.stack([*a.T, *axis.T, *rest])


def _silhouettes(ends: np.ndarray, focal: float, side: int) -> tuple[np.ndarray, Tensor]:
    """In pixels: [7, F * P] segments and radii, and int64 boxes [4, F * P] around them.

    side: of the picture, in pixels
    """
    focal = focal * side
    depth = np.maximum(ends[..., 2], 0.1)
    x = ends[..., 0] / depth * focal + side / 2  # [F, P, 2]
    y = side / 2 - ends[..., 1] / depth * focal
    # a sphere off the axis is seen as an ellipse, at most so much longer than its radius
    off = (ends[..., 0] ** 2 + ends[..., 1] ** 2) / depth**2
    r = (
        RADII / depth * focal * np.sqrt(1 + off) * 1.02 + 0.5
    )  # a pixel's rays lie 0.36 off its centre
    low = [np.clip(np.floor((v - r).min(-1)), 0, side) for v in (x, y)]
    high = [np.clip(np.ceil((v + r).max(-1)), 0, side) for v in (x, y)]
    width, height = high[0] - low[0], high[1] - low[1]
    boxes = np.stack([low[0], low[1], width, width * height]).reshape(4, -1)
    dx, dy = x[..., 1] - x[..., 0], y[..., 1] - y[..., 0]
    inverse = 1 / np.maximum(dx * dx + dy * dy, 1e-6)
    rows = (x[..., 0], y[..., 0], dx, dy, inverse, r[..., 0], r[..., 1] - r[..., 0])
    return np.stack(rows).reshape(7, -1), torch.from_numpy(boxes.astype(np.int64))


def _candidates(silhouettes: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels inside each cone's silhouette, or a little outside: cone, row, column [K]."""
    count = boxes[3]
    start = count.cumsum(0) - count
    cone = torch.repeat_interleave(count)
    rows = torch.cat([boxes[:3], start[None]]).int()  # int32 divides faster
    left, top, width, start = rows.index_select(1, cone)
    local = torch.arange(len(cone), dtype=torch.int32, device=cone.device) - start
    down = local // width
    row, column = top + down, left + (local - down * width)
    x0, y0, dx, dy, inverse, radius, growth = silhouettes.index_select(1, cone)
    px, py = column + 0.5 - x0, row + 0.5 - y0
    share = ((px * dx + py * dy) * inverse).clamp(0, 1)
    px, py = px - share * dx, py - share * dy
    reach = torch.maximum(radius, radius + growth)
    inside = (px * px + py * py < reach * reach).nonzero()[:, 0]
    return tuple(values.index_select(0, inside).long() for values in (cone, row, column))


def _lights(scenes: Sequence[Scene], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tints [C, 3], and the shares of light from everywhere [C]."""
    lights = [LIGHTS[scene.light] for scene in scenes]
    tints, ambients = zip(*lights, strict=True)
    return _to(np.array(tints), device), _to(np.array(ambients), device)


def _to(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, torch.float32)


def render_clips(
    num_clips: int,
    seed: int = 0,
    *,
    file: Path | None = None,
    size: int = 64,
    num_frames: int = 16,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 clips [M, N, H, W, 3] and int64 labels [M] (indices into ACTIONS, in turns).

    Clip i depends on seed and i alone. With `file`, clips are kept there as .npy (memory-mapped)
    and found again by the next call. progress(n) is called as clips are finished. Raises ValueError
    for a file that is truncated or holds clips of another shape.
    """
    labels = np.arange(num_clips, dtype=np.int64) % len(ACTIONS)

    def chunks() -> Iterator[np.ndarray]:
        renderer = Renderer(size, num_frames, device)
        for first in range(0, num_clips, 60):
            indices = range(first, min(first + 60, num_clips))
            yield renderer.clips([draw_scene(seed, i) for i in indices]).cpu().numpy()
            if progress is not None:
                progress(len(indices))

    if file is None:
        return gathered(chunks(), num_clips), labels
    row = (num_frames, size, size, 3)
    return kept(file, chunks(), num_clips, np.uint8, row), labels
