"""Lines of gpu.jsonl as tables in Markdown: one way for all sections, known or not."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gpu_run.findings import OURS, number
from gpu_run.results import Line

TITLES = {  # section -> heading, and what it shows; in the order of the page
    "ceilings": ("Ceilings", "What this card reaches in what it does best."),
    "smoke": ("Smoke", "Each kernel once, against its reference in fp64."),
    "tests": ("Tests", "`pytest tests/gpu`."),
    "sanitizers": ("Sanitizers", "NVIDIA's compute-sanitizer over the kernels' cases."),
    "kernels": (
        "Step kernels",
        "Time of one node of a CUDA graph over rotating buffers, the bytes that the op must move "
        "by that time, and its share of a copy of as many bytes.",
    ),
    "network_ops": ("Network ops", "Read as the step kernels are."),
    "capture": (
        "Capture",
        "The default clip, launched kernel by kernel and replayed from graphs.",
    ),
    "table4": (
        "Table 4",
        "VDM* is the base network made a video network. Loops are kept; one step of them is timed.",
    ),
    "memory": ("Memory", "Peaks of sampling, each in a process of its own."),
    "profile": ("Kernels of a step", "One replayed step of each network, kernel by kernel."),
    "ncu": ("Inside the kernels", "Read by Nsight Compute."),
    "peers": ("Peers", "torch.compile on our VDM*, beside our loop of it."),
    "unet3d": ("diffusers' UNet3D", "As it comes, compiled, and its weights in our network."),
    "variants": ("Variants", ""),
    "steps": (
        "Training steps",
        "The default recipe on pixels: kernels launched one by one, and replayed from a graph.",
    ),
    "train": (
        "Training",
        "The default model's training, cut off by the clock. Its weights are not in this page.",
    ),
}
LEFT_OUT = {"unavailable": "not available", "skipped": "skipped"}
CONTENDERS_ABREAST = ("kernels", "network_ops")  # a column a contender, all metrics in a cell
KERNELS_SHOWN = 8  # the costliest of each network
NOTE = 500  # characters of a note that are shown


# -- Markdown --------------------------------------------------------------------------------------


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; columns without any entry are left out."""
    used = [place for place in range(len(head)) if any(cells[place] for cells in body)]
    lines = [[cells[place] for place in used] for cells in (head, *body)]
    return "\n".join([row(lines[0]), row(["---"] * len(used)), *map(row, lines[1:])])


def sentence(value: object) -> str:
    """A note or a fact as text that no sign of Markdown's changes."""
    if isinstance(value, dict):
        value = ", ".join(f"{name} {fact}" for name, fact in value.items())
    text = " ".join(str(value).split())
    text = text if len(text) <= NOTE else text[:NOTE] + " ..."
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(sign, written)
    return re.sub(r"\*(?=\w)", r"\\*", text)


def code(text: str) -> str:
    """A kernel's name; bars would end the cell."""
    return f"`{text.replace('`', '').replace('|', chr(92) + '|')}`"


def cell(line: Line, named: bool = False) -> str:
    """Value, unit and spread; named: also the metric, where the unit alone leaves it open."""
    if line["status"] != "measured" and line["value"] is None:
        return {"failed": "**failed**", **LEFT_OUT}.get(line["status"], line["status"])
    unit = line["unit"].replace("us", "µs")
    text = f"{number(line['value'])} {unit}".strip()
    if named and unit in ("", "%"):
        text += f" {line['metric']}"
    if line["spread"] is not None and line["spread"] >= 0.05:
        text += f" (spread {line['spread']:.0%})".replace("%", " %")
    return f"**failed**: {text}" if line["status"] == "failed" else text


# -- tables ----------------------------------------------------------------------------------------


def grid(lines: Sequence[Line], down: Sequence[str], across: Sequence[str]) -> str:
    """A table of the lines by two sets of their keys.

    A key that is the same everywhere is no column, but said above; a cell holds all lines that
    share its row and its column.
    """
    several = {key for key in (*down, *across) if len({line[key] for line in lines}) > 1}
    same = [key for key in (*down, *across) if key not in several]
    varying = several - (set() if _in_both_forms(lines) else {"graph"})
    down = [key for key in down if key in varying] or [down[0]]
    across = [key for key in across if key in varying] or [across[0]]
    cells: dict[tuple, dict[tuple, list[str]]] = {}
    order = {name: place for place, name in enumerate(dict.fromkeys(x[down[0]] for x in lines))}
    for line in sorted(lines, key=lambda line: order[line[down[0]]]):
        names, column = (tuple(line[key] for key in keys) for keys in (down, across))
        written = cells.setdefault(names, {}).setdefault(column, [])
        # Bandwidth and share are of the same readings as the time above them.
        once = {"spread": None} if written else {}
        written.append(cell(line | once, named="metric" not in across))
    columns = list(dict.fromkeys(tuple(line[key] for key in across) for line in lines))
    head = [
        *(key if key in ("dtype", "run") else "" for key in down),
        *(", ".join(map(_word, across, column)) for column in columns),
    ]
    body, above = [], None
    for names, line in cells.items():
        written = [_word(key, name) for key, name in zip(down, names, strict=True)]
        if len(down) > 1 and names[0] == above:
            written[0] = ""
        above = names[0]
        body.append([*written, *("<br>".join(line.get(column, [])) for column in columns)])
    said = [_word(key, lines[0][key]) for key in same if key not in (down[0], across[0])]
    said = [word for word in said if word and word != "graphs off"]
    return (f"All of it: {'; '.join(said)}.\n\n" if said else "") + rows(head, body)


def _in_both_forms(lines: Sequence[Line]) -> bool:
    """Whether anything was measured with graphs off and on, so that a column for each is of use."""
    names = [(x["case"], x["contender"], x["metric"], x["dtype"]) for x in lines]
    forms = zip(names, (line["graph"] for line in lines), strict=True)
    return len(set(names)) < len(set(forms))


def _word(key: str, value: object) -> str:
    if key == "graph":
        return "graphs on" if value else "graphs off"
    if key == "contender" and value in OURS:
        return OURS[value]
    text = str(value)
    kernel = key in ("case", "contender") and re.search("[<`]|::", text)
    return code(text) if kernel else sentence(text)


def measured(lines: Sequence[Line], runs: dict[str, str]) -> list[str]:
    """The table of a section's figures; what failed or is missing among them stands in its cell.

    runs: the name of each run, a column where figures of several stand side by side
    """
    metrics = {line["metric"] for line in lines if line["status"] == "measured"}
    shown = [
        line | {"run": runs[line["run"]] if len(runs) > 1 else ""}
        for line in lines
        if line["metric"] in metrics and line["status"] not in ("passed", "done")
    ]
    if not shown:
        return []
    if shown[0]["section"] in CONTENDERS_ABREAST:
        return [grid(shown, ("case", "dtype", "run"), ("contender", "graph"))]
    return [grid(shown, ("case", "contender", "dtype", "run"), ("metric", "graph"))]


def checks(lines: Sequence[Line]) -> list[str]:
    """The table of a section's verdicts, with the notes that say more."""
    shown = [line for line in lines if line["status"] in ("passed", "failed")]
    names = ("case", "contender", "metric", "dtype")
    body = [
        [
            *(_word(name, line[name]) for name in names),
            "**failed**" if line["status"] == "failed" else "passed",
            sentence(line["note"]),
        ]
        for line in shown
    ]
    return [rows([*names, "verdict", "note"], body)] if shown else []


def profile(lines: Sequence[Line], runs: dict[str, str]) -> list[str]:
    """The costliest kernels of each network, below the sum of all."""
    kept = []
    figures = [line for line in lines if line["status"] == "measured"]
    for case in dict.fromkeys(line["case"] for line in figures):
        here = [line for line in figures if line["case"] == case]
        costs = {x["contender"]: x["value"] for x in here if x["metric"] == "time"}
        named = dict.fromkeys(x["contender"] for x in here if x["contender"] != "all")
        ranked = sorted(named, key=lambda name: -costs.get(name, 0))
        for name in ["all", *ranked[:KERNELS_SHOWN]]:
            kept += [_kernel(line) for line in here if line["contender"] == name]
    parts = measured(kept, runs)
    if len(kept) < len(figures):
        parts.append("Kernels that take less stand in gpu.jsonl alone.")
    return parts


def _kernel(line: Line) -> Line:
    """The count of all kernels and that of one of them in one column."""
    if line["contender"] == "all":
        return line | {"metric": "count" if line["metric"] == "kernels" else line["metric"]}
    return line | {"contender": f"`{line['contender']}`"}  # as code, whatever is in it
