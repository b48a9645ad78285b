"""Lines as benchmarks/gpu_check.py writes them: every section and status, invented figures."""

import json

LARGE, SMALL = "64x3x512x512", "16x3x64x64"
CARD = "NVIDIA H100 80GB HBM3"
BLANK = {
    "section": "",
    "case": "",
    "contender": "",
    "metric": "",
    "value": None,
    "unit": "",
    "spread": None,
    "n": None,
    "gpu": CARD,
    "graph": False,
    "dtype": "",
    "status": "measured",
    "note": "",
    "time": 0.0,
    "run": "first",
}
UNITS = {"time": "us", "bandwidth": "GB/s", "of copy": "%", "per step": "ms", "rate": "TFLOP/s"}
TIMES = {  # ms a step with graphs off: VDM*, two phases
    "default, 1 clip": (5.1, 9.4),
    "default, 16 clips": (6.2, 10.1),
    "large, 1 clip": (12.5, 14.0),
    "paper, 1 clip": (64.0, 30.0),
}
CAPTURED = {
    "default, 1 clip": (1.05, 1.9),
    "default, 16 clips": (3.1, 2.2),
    "large, 1 clip": (7.4, 4.5),
    "paper, 1 clip": (60.0, 22.5),
}
MEMORY = {
    "default, 1 clip": (0.11, 0.12),
    "default, 16 clips": (0.61, 0.42),
    "large, 1 clip": (0.8, 0.52),
    "paper, 1 clip": (5.9, 4.1),
}
KERNELS = {
    "default": {"base": 358, "residual": 585, "video": 518},
    "large": {"base": 816, "residual": 1296, "video": 1256},
    "paper": {"base": 1305, "residual": 1832, "video": 2185},
}
HEAD = {
    "gpu": CARD,
    "driver": "580.65.06",
    "cuda": "13.0",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "nvcc": "13.0.48",
    "python": "3.12.3",
    "cpu": "Intel Xeon",
    "commit": "33f3af2",
    "dirty": False,
    "date": "2026-01-02 03:04 UTC",
    "memory_gib": 79.6,
    "clocks": {"sm": 1980, "memory": 2619},
    "power limit": "700 W",
    "budget_s": 560,
}


def line(section: str, **values: object) -> dict:
    return BLANK | {"section": section} | values


def head(**facts: object) -> dict:
    return line("head", status="head", note=json.dumps(HEAD | facts))


def tail(**facts: object) -> dict:
    facts = {"clocks after": {"sm": 1755}, "temperature": 61, "exit status": 1} | facts
    return line("tail", status="tail", note=json.dumps(facts), time=533.1)


def done(section: str, seconds: float = 12.0) -> dict:
    return line(section, status="done", value=seconds, unit="s", metric="seconds")


def kernel(section, case, contender, dtype, time, share, spread=0.01) -> list[dict]:
    values = {"time": time, "bandwidth": 30 * share, "of copy": share}
    return [
        line(
            section,
            case=case,
            contender=contender,
            dtype=dtype,
            metric=metric,
            value=value,
            unit=UNITS[metric],
            spread=spread,
            n=2,
            graph=True,
        )
        for metric, value in values.items()
    ]


def kernels() -> list[dict]:
    found = []
    for dtype, size in (("fp32", 2), ("bf16", 1)):
        for shape, time in ((LARGE, 100.0), (SMALL, 2.3)):
            of = dtype, time * size
            for place, case in enumerate(
                (
                    "residual_step, plain",
                    "residual_step, guided",
                    "residual_step, drawn",
                    "decomposed_step, plain",
                    "remove_base, plain",
                    "decomposed_noise, plain",
                )
            ):
                name = f"{case}, {shape}"
                slow = 1.3 if "guided" in case else 1
                found += kernel("kernels", name, "cuda", of[0], of[1] * slow, 95 - 3 * place)
                found += kernel("kernels", name, "triton", of[0], of[1] * 1.1, 88 - 2 * place, 0.08)
                found += kernel("kernels", name, "copy", of[0], of[1] * 0.9, 100)
                peer = "randn" if "noise" in case else "eager"
                found += kernel("kernels", name, peer, of[0], of[1] * 4.5, 22)
            found += kernel("kernels", f"residual_step, plain, {shape}", "compiled", *of, 70)
    for op, share in (("group_norm_silu", 71), ("temporal_attention", 78), ("layer_norm", 140)):
        case = f"{op}, 16x128x32x32"
        found += kernel("network_ops", case, "cuda", "bf16", 6.0, share)
        found += kernel("network_ops", case, "triton", "bf16", 7.0, share - 10)
        found += kernel("network_ops", case, "eager", "bf16", 31.0, 12)
    return [*found, done("kernels", 31), done("network_ops", 39.6)]


def clips() -> list[dict]:
    """Table 4 and memory, graphs off and on."""
    found = []
    names = "VDM*, our kernels", "two-phase"
    for graph, times in ((False, TIMES), (True, CAPTURED)):
        of = {"dtype": "bf16", "graph": graph}
        for case, pair in times.items():
            for name, value in zip(names, pair, strict=True):
                of |= {"case": case, "contender": name}
                found.append(line("table4", metric="per step", value=value, unit="ms", n=3, **of))
                over = value / pair[0]
                found.append(line("table4", metric="per step / VDM*", value=over, **of))
        for case, pair in MEMORY.items():
            for name, value in zip(names, pair, strict=True):
                of |= {"case": case, "contender": name}
                for metric, part in (("allocated", 0.9), ("reserved", 1), ("driver", 1.3)):
                    more = {"metric": metric, "value": part * value, "unit": "GiB"}
                    found.append(line("memory", **more, **of))
    return [*found, done("table4", 84), done("memory", 60)]


def profile() -> list[dict]:
    found = []
    for size, counts in KERNELS.items():
        for network, count in counts.items():
            of = {"case": f"{size}, {network}", "graph": True, "dtype": "bf16"}
            all_of = of | {"contender": "all"}
            found.append(line("profile", metric="kernels", value=count, unit="", **all_of))
            found.append(line("profile", metric="time", value=2.1 * count, unit="us", **all_of))
            for place in range(11):
                of["contender"] = f"void kernel_{place}<float, 4|8>(float*)"
                found.append(line("profile", metric="count", value=30 - place, **of))
                found.append(line("profile", metric="time", value=90 - place, unit="us", **of))
    return [*found, done("profile", 24)]


def rest() -> list[dict]:
    """The verdicts, and one of each other status."""
    return [
        line("ceilings", case="copy 2 GiB", metric="bandwidth", value=2987.4, unit="GB/s", n=5),
        line("ceilings", case="matmul 8192 bf16", metric="rate", value=741.0, unit="TFLOP/s"),
        line("ceilings", case="graph node", metric="time", value=1.43, unit="us", graph=True),
        done("ceilings", 9),
        line("smoke", case="residual_step", contender="cuda", status="passed", dtype="bf16"),
        line("smoke", case="geglu", contender="triton", status="failed", note="NaN | at <row> 3"),
        done("smoke", 14),
        line("tests", case="tests/gpu", metric="passed", value=118),
        line("tests", case="tests/gpu", status="passed", note="118 passed in 41 s"),
        done("tests", 44),
        line("sanitizers", case="memcheck", status="passed"),
        line("sanitizers", case="racecheck", status="unavailable", note="no compute-sanitizer"),
        line("sanitizers", case="initcheck", status="skipped", note="10 s left of 560"),
        done("sanitizers", 21),
        line(
            "capture",
            case="default clip, 50 steps",
            contender="plain",
            metric="per step",
            value=8.4,
            unit="ms",
            dtype="bf16",
        ),
        line(
            "capture",
            case="default clip, 50 steps",
            contender="captured",
            metric="per step",
            value=1.94,
            unit="ms",
            dtype="bf16",
            graph=True,
        ),
        done("capture", 22),
        line("peers", status="unavailable", contender="diffusers", note="not installed"),
        done("peers", 1),
        line("ncu", status="skipped", note="no time left"),
        line("warp shuffles", case="a new idea", contender="x", metric="turns", value=12345),
        done("warp shuffles", 2),
    ]


def whole_run(**facts: object) -> list[dict]:
    """One run on one card with something of everything."""
    return [head(**facts), *rest(), *kernels(), *clips(), *profile(), tail()]


def text(lines: list[dict]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)
