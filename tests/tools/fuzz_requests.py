"""Requests that a stranger might send: valid ones, damaged in ways that a seed decides.

python tests/tools/fuzz_requests.py --model FOLDER [--requests 10000] [--seed 0]

sends them to a real server of that model, and says what came of it.
"""

import argparse
import http.client
import itertools
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from server_process import ServerProcess, ask, resident

VALUES = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, -(2**70), 10**300, 0.5, -0.0, 1e308),
    *("", " ", "jump", "walk", "cartwheel", "4", "0.5", "-1", "1e9", "NaN", "inf", "16x16"),
    *("32x32", "99999x99999", "0x0", "16x", "ddim", "mp4", "../../etc/passwd", "a" * 3000, "\0"),
    *("\U0001f600", "e\u0301", "\u202e", "%00", "${7*7}", "' OR 1=1 --", "\r\nx: y", "tiny"),
    *([], [1, 2], {}, {"id": "video_0"}, {"image_url": "data:image/png;base64,AAAA"}),
    *({"image_url": "http://127.0.0.1:1/"}, {"file_id": "file"}, {"a": {"b": {"c": [None]}}}),
)
NAMES = (
    *("prompt", "label", "negative_prompt", "model", "seconds", "size", "seed", "base_seed"),
    *("residual_seed", "num_inference_steps", "guidance_scale", "num_frames", "fps", "solver"),
    *("eta", "base_path", "format", "scale", "input_reference", "video"),
    *("input_reference[image_url]", "input_reference[file_id]", "video[id]", "video[]"),
    *("a[b][c]", "[", "]", "", "__proto__"),
)  # fmt: skip
PATHS = (
    *("/v1/videos", "/v1/videos", "/v1/videos", "/v1/videos/extensions", "/v1/videos/ID/remix"),
    *("/v1/videos/ID", "/v1/videos/ID/content", "/v1/videos/edits", "/v1/videos/characters"),
    *("/v1/models", "/v1/models/tiny", "/health", "/", "/static/app.js", "/openapi.json"),
)
FILES = (
    *(b"", b"\x89PNG\r\n\x1a\n", b"GIF89a\x10\x00\x10\x00", b"\xff\xd8\xff\xe0"),
    *(b"RIFF\x10WEBPVP8 ", b"\0\0\0\x20ftypisom", b"\x1aE\xdf\xa3", b"BM", b"<svg/>", bytes(3000)),
)  # fmt: skip
KNOWN = {
    "/v1/videos": ("POST", "POST", "POST", "GET"),
    "/v1/videos/ID": ("GET", "GET", "DELETE"),
    "/v1/videos/ID/content": ("GET", "HEAD"),
    **{f"/v1/videos/{end}": ("POST",) for end in ("extensions", "ID/remix", "edits", "characters")},
}
METHODS = ("GET", "HEAD", "POST", "POST", "POST", "POST", "DELETE", "PUT", "OPTIONS", "BREW")


class Fuzzed(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def fuzzed(seed: int, ids: list[str]) -> Iterator[Fuzzed]:
    """Requests without end; ids: of videos that are there."""
    chance = random.Random(seed)
    while True:
        kind = chance.choice((_json, _json, _multipart, _urlencoded, _junk))
        body, content_type = kind(chance)
        if chance.random() < 0.2:
            body = _damaged(chance, body)
        headers = {"content-type": content_type} if chance.random() < 0.95 else {}
        if chance.random() < 0.1:
            names = ("idempotency-key", "range", "accept", "if-range", "expect", "origin")
            headers[chance.choice(names)] = chance.choice(("", "x", "bytes=0-", "null", "a" * 500))
        place = chance.choice(PATHS)
        path = place.replace("ID", _id(chance, ids))
        known = KNOWN.get(place, ("GET",)) if chance.random() < 0.75 else METHODS
        if chance.random() < 0.2:
            path += chance.choice(("?variant=video", "?variant=thumbnail", "?limit=3", "?after=x"))
            path += chance.choice(
                ("", "&order=asc", "&order=%00", "&limit=-1", "&limit=9" + "9" * 99)
            )
        yield Fuzzed(chance.choice(known), path, headers, body)


def _id(chance: random.Random, ids: list[str]) -> str:
    others = ("video_0", "..", "%2e%2e%2fx", "%00", "%ff", "video_" + "f" * 32, "x" * 300)
    return chance.choice(ids) if ids and chance.random() < 0.5 else chance.choice(others)


def _fields(chance: random.Random) -> list[tuple[str, object]]:
    """Some fields, most of them as they should be."""
    good = {
        **{"prompt": "jump", "model": "tiny", "seconds": "0.5", "size": "16x16", "seed": 3},
        **{"num_inference_steps": 5, "guidance_scale": 2, "format": "webm", "scale": 1},
        "video": {"id": "video_0"},
    }
    names = chance.sample(sorted(good), chance.randrange(len(good)))
    fields = [(name, good[name]) for name in names]
    for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
        fields.append((chance.choice(NAMES), chance.choice(VALUES)))
    return fields


def _json(chance: random.Random) -> tuple[bytes, str]:
    return json.dumps(dict(_fields(chance))).encode(), "application/json"


def _multipart(chance: random.Random) -> tuple[bytes, str]:
    parts = []
    for name, value in _fields(chance):
        head = f'--b\r\ncontent-disposition: form-data; name="{name}"'
        data = value if isinstance(value, str) else json.dumps(value)
        if chance.random() < 0.2:
            head += f'; filename="{chance.choice(("a.png", "", "../x", "a" * 300))}"'
            data = chance.choice(FILES)
        data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        parts.append(head.encode("utf-8", "surrogatepass") + b"\r\n\r\n" + data + b"\r\n")
    return b"".join(parts) + b"--b--\r\n", "multipart/form-data; boundary=b"


def _urlencoded(chance: random.Random) -> tuple[bytes, str]:
    from urllib.parse import quote

    pairs = [f"{quote(name)}={quote(str(value))}" for name, value in _fields(chance)]
    return "&".join(pairs).encode(), "application/x-www-form-urlencoded"


def _junk(chance: random.Random) -> tuple[bytes, str]:
    kinds = ("application/json", "multipart/form-data; boundary=b", "text/plain", "a", "multipart/")
    return chance.randbytes(chance.randrange(300)), chance.choice(kinds)


def _damaged(chance: random.Random, body: bytes) -> bytes:
    """The body with a byte changed, a piece cut out, or a piece doubled."""
    if not body:
        return body
    start, end = sorted(chance.randrange(len(body) + 1) for _ in range(2))
    way = chance.randrange(3)
    if way == 0:
        return body[:start] + chance.randbytes(1) + body[start + 1 :]
    return body[:start] + (body[end:] if way == 1 else body[start:end] * 2 + body[end:])


# -- against a real server -------------------------------------------------------------------------

_OF_A_STORE = {"jobs", "base_paths", "uploads", "server.lock", "jobs.sqlite3"}
_OF_SQLITE = ("-wal", "-shm", "-journal")


class Outcome(NamedTuple):
    """statuses: how often each came;  memory: MiB of the server after a tenth, and at the end"""

    statuses: Counter
    memory: tuple[float, float]
    clips: int
    wrong: list[str]

    def __str__(self) -> str:
        each = ", ".join(f"{count} x {status}" for status, count in sorted(self.statuses.items()))
        first, last = self.memory
        return (
            f"{self.statuses.total()} requests: {each}; {self.clips} clips made\n"
            f"server: {first:.1f} MiB after a tenth, {last:.1f} MiB at the end "
            f"({100 * (last / first - 1):+.1f} %)\n"
            + "\n".join(self.wrong or ["no crash, no 5xx, no file outside the store"])
        )


def fuzz(folder: Path, model: Path, count: int, seed: int = 0) -> Outcome:
    """Sends so many requests to a server whose store is in this folder, which is empty."""
    temporary = folder / "temporary"
    temporary.mkdir()
    server = ServerProcess(
        folder / "store",
        folder / "log",
        *("--model", model, "--served-model-name", "tiny"),
        variables={"TMPDIR": str(temporary)},
    )
    server.start()
    engines, statuses, wrong, memory = server.engines(), Counter(), [], []
    connection = server.connect()
    try:
        ids = [
            ask(connection, "POST", "/v1/videos", {"prompt": "jump"}).json["id"] for _ in range(3)
        ]
        for number, request in enumerate(itertools.islice(fuzzed(seed, ids), count)):
            if number == count // 10:
                memory.append(resident(server.process.pid))
            try:
                connection.request(request.method, request.path, request.body, request.headers)
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                wrong.append(f"no answer ({error!r}) to {request}")
                connection = server.connect()
                continue
            statuses[answer.status] += 1
            if answer.status == 200 and request.method == "POST":
                ids.append(json.loads(body)["id"])  # some are deleted
            if answer.status >= 500:
                wrong.append(f"{answer.status}: {body[:300]!r} to {request}")
            elif answer.status >= 400 and request.method != "HEAD":
                if not json.loads(body)["error"]["message"]:
                    wrong.append(f"no message: {body[:300]!r} to {request}")
        memory.append(resident(server.process.pid))
        page = ask(connection, "GET", "/metrics").body.decode()
        clips = int(float(page.partition("\nvfengine_clips_total ")[2].split()[0]))
        if server.process.poll() is not None or server.engines() != engines:
            wrong.append("a process has ended")
    finally:
        connection.close()
        server.stop()
    if "Traceback" in server.log.read_text():
        wrong.append(server.log.read_text()[-3000:])
    return Outcome(statuses, tuple(memory), clips, wrong + _strays(folder))


def _strays(folder: Path) -> list[str]:
    """Files that are no job's, nor what a store has."""
    found = {file.name for file in folder.iterdir()} - {"store", "log", "temporary"}
    found |= {file.name for file in (folder / "temporary").rglob("*") if file.is_file()}
    for file in (folder / "store").iterdir():
        name = file.name
        for ending in _OF_SQLITE:
            name = name.removesuffix(ending)
        found |= set() if name in _OF_A_STORE else {file.name}
    found |= {file.name for file in (folder / "store" / "uploads").iterdir()}
    return [f"a file outside: {name}" for name in sorted(found)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Send random requests to a real server.")
    parser.add_argument("--model", type=Path, required=True, help="folder of a tiny model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        outcome = fuzz(Path(temporary), flags.model, flags.requests, flags.seed)
    print(outcome)
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
